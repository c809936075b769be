"""Train an LSTM (long short-term memory) on MNIST: an image is 28 time steps of 28 pixels.

python rnn_mnist.py --hidden 128
python rnn_mnist.py --one-cycle --augment --save rnn.pt

The first command reaches a test accuracy of about 98.6%, the second one 99.35%.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import common  # common.py in this folder, not PyPI's package of that name
from common import Epoch, check_losses, check_network, create_model, evaluate, random_affine

# cnn_mnist.py contains the same function train(), on purpose, so that each file can be read alone.
# Only the peak of the learning rate and the shift of augment differ; they were chosen on held-out
# training images.


class RNN(nn.Module):
    """Map N images (N, 1, 28, 28) or sequences (N, T, input_size) to logits (N, num_classes).

    The T time steps of an image are its 28 rows, from the top. Logits are one score for each class.
    No softmax follows, because CrossEntropyLoss applies it.
    """

    def __init__(self, hidden_size=128, num_layers=2, input_size=28, num_classes=10):
        super().__init__()
        # An LSTM layer reads one time step x after the other. It keeps two vectors of hidden_size
        # numbers: its output h, called the hidden state, and its memory c; both start at zero. At
        # each time step, it computes four vectors of this size from x and the previous h:
        #     i, f, o = sigmoid(W x + U h + b), between 0 and 1;  g = tanh(W x + U h + b),
        # each with its own matrices W and U and its own bias b. Then, element by element,
        #     c = f * c + i * g;  h = o * tanh(c).
        # So f decides how much of the memory is kept, i how much is added, and o how much is
        # output. Because c is updated by addition, gradients reach early time steps better than in
        # a plain recurrent network (RNN). See Hochreiter and Schmidhuber (1997), Gers et al. (2000,
        # for f), and torch.nn.LSTM, which has two biases: 4 * 128 * (28 + 128 + 2) parameters in
        # the first layer. The second layer reads the h of the first one: 4 * 128 * (128 + 128 + 2).
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)  # 10 * (128 + 1); in all 214,282

    def forward(self, x):
        if x.dim() == 4:
            x = x.squeeze(1)  # (N, 28, 28), without the channel of an image
        # batch_first: x is (N, T, input_size), not (T, N, input_size).
        out, _ = self.lstm(x)  # (N, T, hidden_size): h of the last layer at each time step
        last = out[:, -1]  # (N, hidden_size): at the last time step, when all rows have been read
        return self.fc(last)  # (N, num_classes)


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
    used. lr: the learning rate, 0.001 by default; with one_cycle its peak, 0.005 by default.
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
        lr = 0.005 if one_cycle else 0.001
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
                images = random_affine(images, shift=2)  # in pixels
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
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("LSTM: hidden size and number of layers").add_argument
    add("--hidden", type=common.number(1), default=128, help="default: %(default)s")
    add("--layers", type=common.number(1), default=2, help="default: %(default)s")
    args = common.parse_args(parser, argv)
    network = common.start_network(lambda: RNN(args.hidden, args.layers), args)
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
