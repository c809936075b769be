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
        # The same as pooling after ReLU, both being monotonic, but ReLU then has a quarter of the values to go through.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # (N, 16, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 32, 7, 7)
        return self.fc(x.flatten(start_dim=1))  # (N, 10)


def main(argv=None):
    """Train and evaluate as the command line `argv` says; return the trained model."""
    args = common.parse_args(common.make_parser(__doc__), argv)
    common.set_seed(args.seed)
    model = CNN().to(args.device, memory_format=torch.channels_last)
    if args.load:
        common.load_weights(model, args)
    if args.predict:
        common.predict_pictures(model, args)
        return model
    train_loader, test_loader = common.make_loaders(args)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one pass over all weights
    print(common.describe(args, model, train_loader, test_loader))

    steps = len(train_loader)
    scheduler = None
    if args.one_cycle and args.epochs:
        scheduler = OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.epochs * steps)
    for epoch in range(1, args.epochs + 1):
        start = common.clock(args.device)
        for step, (images, labels) in enumerate(train_loader, start=1):
            if args.augment:
                images = common.random_affine(images, shift=1)  # more is too much for a network this small
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(images)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            if step % 100 == 0 or step == steps:
                common.check_finite(loss, epoch, step)
                print(f"Epoch [{epoch}/{args.epochs}], Step [{step}/{steps}], Loss: {loss:.4f}")
        seconds = common.clock(args.device) - start
        test_loss, accuracy, confusion = common.evaluate(model, test_loader)
        print(
            f"Epoch [{epoch}/{args.epochs}], Test loss: {test_loss:.4f}, "
            f"Test accuracy: {accuracy:.2%}, Time: {seconds:.2f} s"
        )
        if args.save:
            common.save_weights(model, args, epoch)
    if args.epochs:
        print("Training finished.")
    else:
        test_loss, accuracy, confusion = common.evaluate(model, test_loader)
        print(f"Test loss: {test_loss:.4f}, Test accuracy: {accuracy:.2%}")
    classes = common.class_names(args.dataset)
    common.print_table(confusion, classes)
    if args.errors:
        common.draw_errors(args.errors, model, test_loader, classes)
    return model


if __name__ == "__main__":
    common.run(main)
