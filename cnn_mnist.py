"""Train a small convolutional network (CNN) on MNIST.

python cnn_mnist.py --epochs 10
python cnn_mnist.py --one-cycle --augment --save cnn.pt

The first command reaches a test accuracy of about 98.9%, the second one 99.4%.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import common  # common.py in this folder, not PyPI's package of that name
from common import Epoch, check_results, create_model, evaluate, format_scores, random_affine

# rnn_mnist.py contains the same function train(), on purpose, so that you can read either file.
# Only two numbers differ: the peak of the learning rate, and the shift of augment.


class CNN(nn.Module):
    """Map N images (N, 1, 28, 28) in [0, 1] to logits (N, num_classes).

    Logits are one score for each class. No softmax follows, because CrossEntropyLoss applies it.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        # A 3x3 convolution would cut off a border; with padding 1, it keeps the size of the image.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)  # 16 * (1 * 9 weights + 1 bias)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)  # 32 * (16 * 9 + 1)
        self.fc = nn.Linear(32 * 7 * 7, num_classes)  # 10 * (1568 + 1); sum: 20,490

    def forward(self, x):
        if x.device.type == "cpu":
            x = x.to(memory_format=torch.channels_last)  # makes convolutions on a CPU faster
        # ReLU keeps the order of values, so it may follow max pooling: a quarter of the work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, num_classes)


def train(
    network, data, *, epochs=10, lr=None, one_cycle=False, augment=False, seed=0, after_epoch=None
):
    """Train a network, and evaluate it after each epoch; return the network and a list of Epochs.

    network: a class or function that creates it. data: a Data. lr: the learning rate, 0.001 by
    default; with one_cycle its peak, 0.01 by default. augment: distort the training images, which
    have to be square. after_epoch: a function that is called with the network and the Epochs so
    far; if it returns True, the training ends. The same call gives the same weights, if machine and
    number of threads are the same. Raises TypeError if network is a Module, FloatingPointError if a
    loss is not finite, and ValueError if there are not as many names of classes as outputs.
    """
    model, device = create_model(network, seed, data.device)
    steps = len(data.train_loader)
    if lr is None:
        lr = 0.01 if one_cycle else 0.001
    criterion = nn.CrossEntropyLoss()  # evaluate() always uses it, even if you change this line
    # fused=True is faster: one operation updates all weights. Some optimizers do not have it.
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    if one_cycle:
        # In the first 30% of the steps, the learning rate rises from lr / 25 to lr; then it falls
        # to almost 0. Adam's beta1 (or SGD's momentum) falls from 0.95 to 0.85, then rises again.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps)
    history = []
    for epoch in range(1, epochs + 1):
        # So the order of the samples, dropout and augment do not depend on what was drawn before.
        torch.manual_seed(1000 * seed + epoch)
        progress = f"Epoch [{epoch}/{epochs}]"
        start = time.perf_counter()
        loss_sum, count = 0, 0
        model.train()  # training mode: dropout is on, and BatchNorm uses the batch
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            images, labels = images.to(device), labels.to(device)  # a DataLoader's are on the CPU
            if augment:
                images = random_affine(images, shift=1)  # by at most 1 pixel
            logits = model(images)  # (N, num_classes)
            loss = criterion(logits, labels)  # the mean over the batch
            optimizer.zero_grad()  # because backward() adds to the gradients
            loss.backward()  # computes the gradients
            optimizer.step()  # changes the weights
            if one_cycle:
                scheduler.step()
            # Not loss.item(), which would wait for a GPU: it computes while Python goes on.
            loss_sum += loss.detach() * len(labels)  # detach(): no gradient is needed
            count += len(labels)
            if step % 100 == 0 or step == steps:
                print(f"{progress}, Step [{step}/{steps}], Loss: {loss:.4f}", flush=True)
        train_loss = (loss_sum / count).item()  # waits for a GPU, so that `seconds` is right
        seconds = time.perf_counter() - start

        model.eval()  # evaluation mode, for after_epoch and the caller
        evaluation = evaluate(model, data.eval_loader)
        check_results(train_loss, evaluation, data.classes)
        scores = format_scores(evaluation, data.split)
        print(f"{progress}, {scores}, Time: {seconds:.2f} s", flush=True)
        history.append(Epoch(epoch, train_loss, evaluation.loss, evaluation.accuracy, seconds))
        if after_epoch and after_epoch(model, history):
            break
    return model, history


def main(argv=None):
    """Run the command line `argv`, a list; return the network and its Evaluation."""
    args = common.parse_args(common.make_parser(__doc__), argv)
    return common.run_command(args, CNN, train)


if __name__ == "__main__":
    model, evaluation = common.run(main)  # to look at, in a notebook
