"""Train an LSTM (long short-term memory) on MNIST: an image is 28 time steps of 28 pixels.

python rnn_mnist.py --hidden 128
python rnn_mnist.py --one-cycle --augment --save rnn.pt

The first command reaches a test accuracy of about 98.6%, the second one 99.4%.
"""

import time

import torch
from torch import nn

import common  # common.py in this folder, not PyPI's package of that name
from common import Epoch, check_results, create_model, evaluate, format_scores, random_affine

# cnn_mnist.py contains the same function train(), on purpose, so that you can read either file.
# Only two numbers differ: the peak of the learning rate, and the shift of augment.


class RNN(nn.Module):
    """Map N images (N, 1, 28, 28) or sequences (N, T, input_size) to logits (N, num_classes).

    The T time steps of an image are its 28 rows, from the top. Logits are one score for each class.
    No softmax follows, because CrossEntropyLoss applies it.
    """

    def __init__(self, hidden_size=128, num_layers=2, input_size=28, num_classes=10):
        super().__init__()
        # An LSTM reads one time step after the other. Each layer keeps two vectors for a sequence:
        # the hidden state, which is its output, and the cell state, its memory. Both start at zero.
        # The second layer reads the hidden states of the first one. batch_first: x is (N, T, ...).
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x):
        if x.dim() == 4:
            x = x.squeeze(1)  # (N, 28, 28), without the channel of an image
        out, _ = self.lstm(x)  # out: the last layer's hidden states (N, T, ...); _: final states
        return self.fc(out[:, -1])  # (N, num_classes), from the last step: it has seen all rows


def train(
    network, data, *, epochs=10, lr=None, one_cycle=False, augment=False, seed=0, after_epoch=None
):
    """Train a network, and evaluate it after each epoch; return the network and a list of Epochs.

    network: a class or function that creates it. data: a Data. lr: the learning rate, 0.001 by
    default; with one_cycle its peak, 0.005 by default. augment: distort the training images, which
    have to be square. after_epoch: a function that is called with the network and the Epochs so
    far; if it returns True, the training ends. The same call gives the same weights, if machine and
    number of threads are the same. Raises TypeError if network is a Module, FloatingPointError if a
    loss is not finite, and ValueError if there are not as many names of classes as outputs.
    """
    model, device = create_model(network, seed, data.device)
    steps = len(data.train_loader)
    if lr is None:
        lr = 0.005 if one_cycle else 0.001
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
                images = random_affine(images, shift=2)  # by at most 2 pixels
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
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("LSTM: hidden size and number of layers").add_argument
    add("--hidden", type=common.positive_int, default=128, help="default: %(default)s")
    add("--layers", type=common.positive_int, default=2, help="default: %(default)s")
    args = common.parse_args(parser, argv)
    return common.run_command(args, lambda: RNN(args.hidden, args.layers), train)


if __name__ == "__main__":
    model, evaluation = common.run(main)  # to look at, in a notebook
