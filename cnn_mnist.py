"""Train a small convolutional network (CNN) on MNIST.

python cnn_mnist.py --epochs 10
python cnn_mnist.py --one-cycle --augment --save cnn.pt

The first command reaches a test accuracy of about 98.8%, the second one 99.35%.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import common  # common.py in this folder, not PyPI's package of that name
from common import Epoch, check_losses, check_network, create_model, evaluate, random_affine

# rnn_mnist.py contains the same function train(), on purpose, so that each file can be read alone.
# Only the peak of the learning rate and the shift of augment differ; they were chosen on held-out
# training images.


class CNN(nn.Module):
    """Map N images (N, 1, 28, 28), (N, 28, 28) or (N, 784) in [0, 1] to logits (N, num_classes).

    Logits are one score for each class. No softmax follows, because CrossEntropyLoss applies it.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        # A convolution has one filter for each output channel. At each pixel, a filter adds a bias
        # to a weighted sum of the 3x3 pixels that are centred there, in all input channels;
        # its weights are the same everywhere in the image. With padding 1 (a border of zeros),
        # height and width stay the same. The tutorial has 16 and 32 channels, too.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)  # parameters: 16 * (1 * 9 + 1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)  # 32 * (16 * 9 + 1)
        self.fc = nn.Linear(32 * 7 * 7, num_classes)  # 10 * (1568 + 1); in all 20,490

    def forward(self, x):
        x = x.reshape(len(x), 1, 28, 28)
        if x.device.type == "cpu":
            # only for speed: in memory, all channels of a pixel will be side by side
            x = x.to(memory_format=torch.channels_last)
        # The tutorial applies ReLU before max pooling; here, it follows, when only 1/4 of the
        # values are left. The result is the same, because ReLU never makes the larger of two
        # values the smaller one.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, num_classes)


def train(
    network,
    data,
    *,
    epochs=10,
    lr=None,
    optimizer=None,
    criterion=F.cross_entropy,
    one_cycle=False,
    augment=False,
    seed=0,
    after_epoch=None,
):
    """Train a network, and validate it after each epoch; return the network and a list of Epochs.

    network: a class or function that creates a new network. data: a Data; its test_loader is not
    used. lr: the learning rate, 0.001 by default; with one_cycle its peak, 0.01 by default.
    optimizer: a function of parameters and lr that creates the optimizer, such as torch.optim.SGD;
    Adam by default. criterion: a function of logits and labels that returns the mean loss, or a
    loss object (not its class), such as nn.CrossEntropyLoss(label_smoothing=0.1). augment: distort
    the training images; see random_affine(). after_epoch: a function that is called with the
    network and the Epochs so far; if it returns a true value, the training ends.

    The same call gives the same weights, with the same machine, number of threads and version of
    PyTorch. This does not hold for a DataLoader with its own generator or persistent workers, for
    random numbers of Python or NumPy in your code, and, on a GPU, for operations that are not
    repeatable, such as adaptive pooling. To train a copy of a network further, pass
    lambda: copy.deepcopy(model), and another seed, for another order of the batches.

    Raises ValueError if an optimizer is passed without lr, FloatingPointError if a loss is not
    finite, and what create_model(), check_network() and random_affine() raise.
    """
    if optimizer and lr is None:
        raise ValueError("pass a learning rate for this optimizer: lr=...")
    model = create_model(network, seed).to(data.device)
    check_network(model, data)
    steps = len(data.train_loader)
    if lr is None:
        lr = 0.01 if one_cycle else 0.001
    if optimizer:
        optimizer = optimizer(model.parameters(), lr)
    else:
        # fused is only for speed: one operation updates all weights.
        optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    if one_cycle and epochs:
        # In the first 30% of the steps, the learning rate rises from lr / 25 to lr, so that the
        # first steps do no harm; then it falls to almost 0, so that the weights settle. Adam's
        # beta1, how much of the previous direction a step keeps (in SGD: the momentum), falls from
        # 0.95 to 0.85 and rises again. See Smith and Topin, "Super-convergence" (2018).
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    history = []
    for epoch in range(1, epochs + 1):
        # Each epoch has its own seed, so that random numbers which after_epoch draws do not change
        # the next epoch. Up to 1000 epochs, two values of `seed` never give the same epoch seed.
        torch.manual_seed(1000 * seed + epoch)
        start = time.perf_counter()
        loss_sum, count = 0, 0
        model.train()  # training mode, for dropout and BatchNorm (CNN and RNN have neither)
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            # The batches of a Loader are on this device already, those of a DataLoader on the CPU.
            images, labels = images.to(data.device), labels.to(data.device)
            if augment:
                images = random_affine(images, shift=1)  # in pixels
            logits = model(images)  # (N, num_classes)
            loss = criterion(logits, labels)  # the mean over the batch
            optimizer.zero_grad()  # because backward() adds to the gradients
            loss.backward()  # computes the gradients
            optimizer.step()  # changes the weights
            if one_cycle:
                scheduler.step()
            # Without detach(), loss_sum would keep the recorded operations of all steps. With
            # loss.item() instead, each step would wait for the GPU, not only those that print.
            loss_sum += loss.detach() * len(labels)
            count += len(labels)
            if step % 100 == 0 or step == steps:
                print(
                    f"Epoch [{epoch}/{epochs}], Step [{step}/{steps}], Loss: {loss:.4f}", flush=True
                )
        train_loss = (loss_sum / count).item()  # waits for a GPU, so that `seconds` is right
        seconds = time.perf_counter() - start

        model.eval()  # evaluation mode, for after_epoch and the caller
        validation = evaluate(model, data.val_loader, criterion)
        check_losses(train_loss, validation.loss)
        print(
            f"Epoch [{epoch}/{epochs}], Training loss: {train_loss:.4f}, "
            f"Validation loss: {validation.loss:.4f}, "
            f"Validation accuracy: {validation.accuracy:.2%}, Time: {seconds:.2f} s",
            flush=True,
        )
        history.append(Epoch(epoch, train_loss, validation.loss, validation.accuracy, seconds))
        if after_epoch and after_epoch(model, history):
            print("after_epoch returned a true value: training ends.")
            break
    return model, history


def main(argv=()):
    """Run the command line `argv`, a list; return the network and the Evaluation of its test.

    With --predict, there is no test, and None is returned instead.
    """
    args = common.parse_args(common.make_parser(__doc__), argv)
    network = common.start_network(CNN, args)
    if args.predict:
        model = network()
        common.predict_pictures(model, args.predict, "0123456789")
        return model, None
    data = common.read_data(args)
    model, _ = train(
        network,
        data,
        epochs=args.epochs,
        lr=args.lr,
        one_cycle=args.one_cycle,
        augment=args.augment,
        seed=args.seed,
        after_epoch=common.make_saver(args),
    )
    # at the end, once: choose options by the validation, not by these results
    evaluation = evaluate(model, data.test_loader)
    common.report(evaluation, model, data, args)
    return model, evaluation


if __name__ == "__main__":
    # In a notebook, you can look at these afterwards, for example at evaluation.confusion.
    model, evaluation = common.run(main)
