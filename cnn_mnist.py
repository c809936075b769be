"""Train a small convolutional network on MNIST.

python cnn_mnist.py --epochs 10 --device cuda
python cnn_mnist.py --one-cycle --augment --save cnn.pt
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import common


class CNN(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] to logits (N, 10): no softmax, CrossEntropyLoss has its own."""

    def __init__(self):
        super().__init__()
        # Padding 1 keeps the size through a 3x3 convolution, so that only the pooling halves it: 28, 14, 7.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.fc = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x):
        # The largest of four values is the same before and after ReLU, which after pooling has a quarter of them to do.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, 10)


def main(argv=None, model=None):
    """Train `model`, or a CNN, as the options `argv` say; return it, and what evaluate found in the end."""
    # options
    args = common.parse_args(common.make_parser(__doc__), argv)
    torch.manual_seed(args.seed)

    # model
    # Channels-last convolutions are faster, but wrong on Apple's GPUs in some versions of PyTorch.
    layout = torch.contiguous_format if args.device.type == "mps" else torch.channels_last
    model = (model or CNN()).to(args.device, memory_format=layout)
    if args.load:
        common.load_weights(model, args.load)
    if args.predict:
        common.predict_pictures(model, args)
        return model, None

    # data
    data = common.load_data(args)
    steps = len(data.train_loader)
    common.print_header(args, model, data)

    # train
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one pass over all weights
    if args.one_cycle:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(1, args.epochs * steps))
    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), []
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            if args.augment:
                images = common.random_affine(images, shift=1)  # a network this small gains nothing from more
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(images)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.one_cycle:
                scheduler.step()
            losses.append(loss.detach())
            if step % 100 == 0 or step == steps:
                print(f"Epoch [{epoch}/{args.epochs}], Step [{step}/{steps}], Loss: {loss:.4f}")
        evaluation = common.end_epoch(args, epoch, model, data, losses, start)

    # report
    if args.epochs < 1:
        evaluation = common.evaluate(model, data.eval_loader)
    common.report(args, data, evaluation)
    return model, evaluation


if __name__ == "__main__":
    model, evaluation = common.run(main)
