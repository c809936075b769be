"""Train a small convolutional network (CNN) on MNIST.

python cnn_mnist.py --epochs 10 --device cuda
python cnn_mnist.py --one-cycle --augment --save cnn.pt

The first command reaches a test accuracy of about 98.8%, the second one 99.4%.

common.py has to lie beside this file; its first lines say what to read in it. (Do not install it:
PyPI's package "common" is another one.) The same training loop is also in rnn_mnist.py, on purpose,
so that you can read each script alone. The two scripts differ in the network with its options, and
in two numbers: one_cycle_lr and shift.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import common


class CNN(nn.Module):
    """Map images (N, 1, 28, 28) in [0, 1] to logits (N, 10).

    Logits are the scores before softmax: there is no softmax here, because CrossEntropyLoss applies
    it.
    """

    def __init__(self):
        super().__init__()
        # With padding 1, a 3x3 convolution keeps the size of the image; only pooling halves it.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.fc = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x):
        if x.device.type == "cpu":
            # On a CPU, convolutions are faster with the channels last in memory. (clone(),
            # because to() ignores this format if there is only one channel.)
            x = x.clone(memory_format=torch.channels_last)
        # ReLU and max pooling can be swapped. Pooling first leaves fewer values for ReLU.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, 10)


def main(argv=None, model=CNN, data=None):
    """Train a network with the options in `argv`; return it and its last evaluation.

    argv: a list, or a string that is split at spaces; by default, the command line.
    model: a class or function that creates the network, or a network to train further. A class or
    function is called after the seed is set, so that the seed decides the first weights.
    data: your own common.Data instead of the dataset that the options select. Then, --limit,
    --validate and --batch-size are refused, and --dataset and --data-dir have no effect.
    The network is returned in evaluation mode. With --predict, nothing is trained, and the
    evaluation is None.
    """
    # options
    # one_cycle_lr was chosen on held-out training images (--validate), and so was shift, below.
    parser = common.make_parser(__doc__, one_cycle_lr=0.01)
    args = common.parse_args(parser, argv, data)
    common.set_up(args.seed)

    # model
    if not isinstance(model, nn.Module):
        model = model()  # a class or a function: create the network
    model.to(args.device)
    if args.load:
        common.load_weights(model, args.load)
    if args.predict:
        common.predict_pictures(model, args)
        return model, None

    # data
    data = data or common.load_data(args)
    steps = len(data.train_loader)
    common.print_header(args, model, data)

    # train
    criterion = nn.CrossEntropyLoss()
    # fused=True is faster: one operation updates all weights. Adam, AdamW, SGD have it; remove it
    # for another optimizer. args.lr is 0.001 by default (with --one-cycle: one_cycle_lr).
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    if args.one_cycle:  # OneCycleLR starts at args.lr / 25, rises to args.lr, then falls.
        total_steps = max(1, args.epochs * steps)  # with 0 epochs, OneCycleLR would fail
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        losses = []
        model.train()
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            # load_data puts its batches on the device; those of your own loader may be elsewhere.
            images, labels = images.to(args.device), labels.to(args.device)
            if args.augment:
                images = common.random_affine(images, shift=1)  # by at most 1 pixel
            logits = model(images)  # (N, 10)
            loss = criterion(logits, labels)
            optimizer.zero_grad()  # because backward() adds to the gradients
            loss.backward()
            optimizer.step()
            if args.one_cycle:
                scheduler.step()
            losses.append(loss.detach())  # without its graph; loss.item() would wait for the GPU
            if step % 100 == 0 or step == steps:  # not in each step: printing waits for the GPU
                print(f"Epoch [{epoch}/{args.epochs}], Step [{step}/{steps}], Loss: {loss:.4f}")
        train_loss = torch.stack(losses).mean().item()
        seconds = time.perf_counter() - start  # after item(), which waits for the GPU
        # To compare options, add --validate: then, the evaluation uses held-out training images.
        evaluation = common.evaluate(model, data.eval_loader)
        common.check_finite(train_loss, evaluation.loss)
        scores = common.format_scores(data, evaluation)
        print(f"Epoch [{epoch}/{args.epochs}], {scores}, Time: {seconds:.2f} s")
        if args.save:
            common.save_weights(model, args.save)
        if args.log:
            common.write_log(args.log, epoch, data, train_loss, evaluation, seconds)

    # report
    if args.epochs < 1:  # The loop has not run, so evaluate now.
        evaluation = common.evaluate(model, data.eval_loader)
    common.report(args, data, evaluation)
    model.eval()
    return model, evaluation


if __name__ == "__main__":
    # run() calls main() and shortens error messages. After %run, a notebook has both variables.
    model, evaluation = common.run(main)
