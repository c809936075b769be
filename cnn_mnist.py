"""Train a small convolutional network on MNIST.

python cnn_mnist.py --dataset synthetic --epochs 1
python cnn_mnist.py --epochs 10 --device cuda
python cnn_mnist.py --one-cycle --augment --save cnn.pt
python cnn_mnist.py --load cnn.pt --predict my_digit.png
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

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


def main(argv=None):
    """Train and evaluate as the command line `argv` says; return the trained model."""
    # options
    args = common.parse_args(common.make_parser(__doc__), argv)
    common.prepare_process(args.seed)

    # model
    # Channels-last convolutions are faster, but wrong on Apple's GPUs in some versions of PyTorch.
    layout = torch.contiguous_format if args.device.type == "mps" else torch.channels_last
    model = CNN().to(args.device, memory_format=layout)
    if args.load:
        common.load_weights(model, args)
    if args.predict:
        common.predict_pictures(model, args)
        return model

    # data
    data = common.load_data(args)
    steps = len(data.train_loader)

    # loss and optimizer
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one pass over all weights
    if args.one_cycle:
        scheduler = OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.epochs * steps or 1)

    # train
    common.print_header(args, model, data)
    for epoch in range(1, args.epochs + 1):
        progress, loss_sum, count = f"Epoch [{epoch}/{args.epochs}]", 0, 0
        start = common.clock(args.device)
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            if args.augment:
                images = common.random_affine(images, shift=1)  # a network this small gains nothing from more
            # forward
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(images)
                loss = criterion(logits, labels)
            # backward and step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.one_cycle:
                scheduler.step()
            loss_sum, count = loss_sum + loss.detach() * len(labels), count + len(labels)
            if step % 100 == 0 or step == steps:
                common.check_finite(loss.item(), epoch, step)
                print(f"{progress}, Step [{step}/{steps}], Loss: {loss:.4f}")
        seconds = common.clock(args.device) - start
        evaluation = common.evaluate(model, data.eval_loader)
        common.check_finite(evaluation.loss, epoch, steps)
        print(f"{progress}, {common.scores(data, evaluation)}, Time: {seconds:.2f} s")
        if args.log:
            common.log_epoch(args, data, epoch, loss_sum / count, evaluation, seconds)
        if args.save:
            common.save_weights(model, args, data, epoch)

    # report
    if not args.epochs:
        evaluation = common.evaluate(model, data.eval_loader)
    common.report(args, data, evaluation)
    return model


if __name__ == "__main__":
    model = common.run(main)
