"""Train a small convolutional network on MNIST.

python cnn_mnist.py
python cnn_mnist.py --epochs 10 --device cuda
python cnn_mnist.py --dataset synthetic --epochs 1
"""

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
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (N, 16, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, 10)


def main(argv=None):
    """Train and evaluate as the command line `argv` says; return the trained model."""
    args = common.make_parser(__doc__).parse_args(argv)
    train_loader, test_loader = common.make_loaders(args)
    common.set_seed(args.seed)
    model = CNN().to(args.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    print(common.describe(args, model, train_loader, test_loader))

    steps = len(train_loader)
    for epoch in range(1, args.epochs + 1):
        start = common.clock(args.device)
        for step, (images, labels) in enumerate(train_loader, start=1):
            logits = model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0 or step == steps:
                common.check_finite(loss, epoch, step)
                print(f"Epoch [{epoch}/{args.epochs}], Step [{step}/{steps}], Loss: {loss:.4f}")
        seconds = common.clock(args.device) - start
        test_loss, accuracy, confusion = common.evaluate(model, test_loader)
        print(
            f"Epoch [{epoch}/{args.epochs}], Test loss: {test_loss:.4f}, "
            f"Test accuracy: {accuracy:.2%}, Time: {seconds:.2f} s"
        )
    if args.epochs:
        print("Training finished.")
    else:
        test_loss, accuracy, confusion = common.evaluate(model, test_loader)
        print(f"Test loss: {test_loss:.4f}, Test accuracy: {accuracy:.2%}")
    common.print_table(confusion)
    return model


if __name__ == "__main__":
    common.run(main)
