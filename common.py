"""What cnn_mnist.py and rnn_mnist.py both need: options, device, data loaders, evaluation, report.

The data goes one way: options -> device -> loaders -> the script's training loop -> evaluate -> report.
A split is two tensors that stay on the device: images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
# Small enough for the activations of a batch to stay in a processor's cache.
TEST_BATCH_SIZE = 200


class UserError(Exception):
    """What whoever runs the script can mend; the text says what is wrong and what to do."""


# ---- options and device ----


def whole_number(minimum):
    """Return an argparse type: an integer from `minimum` to 2**63 - 1, the most that a seed can be."""

    def parse(text):
        if not (text.isdecimal() and minimum <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum} (and below 2**63)")
        return int(text)

    return parse


def learning_rate(text):
    """argparse type: a float above 0, up to 1e37: Adam's first step divides it by 0.1, and float32 ends at 3.4e38."""
    value = float(text)
    if not 0 < value <= 1e37:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, and 1e37 at most")
    return value


def find_device(name):
    """argparse type: the torch.device called `name`, for `auto` the machine's accelerator, else the CPU."""
    names = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator().type
        names = [accelerator, *(f"{accelerator}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]
    if name != "auto" and name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine; choose from auto, {', '.join(names)}")
    return torch.device(names[0] if name == "auto" else name)


def make_parser(description):
    """Return an argparse parser with the options of both scripts; its help page begins with `description`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="passes over the training set; 0 evaluates only (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size", type=whole_number(1), default=100, metavar="N", help="images per step (default: %(default)s)"
    )
    training.add_argument(
        "--lr", type=learning_rate, help="learning rate of Adam (default: 0.001, with --one-cycle a peak of 0.01)"
    )
    training.add_argument(
        "--device",
        type=find_device,
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps, ...; auto is the accelerator, else the CPU (default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="the same seed, machine and options give the same weights (default: %(default)s)",
    )

    training.add_argument("--one-cycle", action="store_true", help="let the learning rate rise to --lr, then fall to 0")
    training.add_argument("--augment", action="store_true", help="turn, scale and shift each training image at random")
    training.add_argument(
        "--amp", action="store_true", help="bfloat16 mixed precision; slower on processors that lack its instructions"
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=[*DATASETS, "synthetic"],
        default="mnist",
        metavar="NAME",
        help=f"{', '.join(DATASETS)}, fetched once; or synthetic: digits drawn on the spot (default: %(default)s)",
    )
    data.add_argument(
        "--data-dir", default="data", metavar="DIR", help="where data sets are kept (default: %(default)s)"
    )
    data.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="train on the first N training images (default: all)"
    )
    return parser


def parse_args(parser, argv):
    """Return the options in `argv`, those whose default depends on another one filled in."""
    args = parser.parse_args(argv)
    args.lr = args.lr or (0.01 if args.one_cycle else 0.001)
    return args


def run(main):
    """Run main() as a process: exit with 1 and one `error:` line for what a user can mend, with 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # a pipe shows progress while it happens
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # At exit Python writes what stdout still holds: where stdout is what failed, that would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has seen enough, as in `| head -1`, wants no message.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {error}")
    except RuntimeError as error:  # torch has no error of its own for a CPU without enough memory
        if "memory" not in str(error) and "Storage size" not in str(error):
            raise
        sys.exit("error: out of memory; use a smaller --batch-size or a smaller network")


# ---- data ----


def random_affine(images, degrees=10, scale=0.1, shift=2, generator=None):
    """Turn, scale and shift each image at random, each in its own way, on the device that they are on.

    images: (N, C, H, W) float. degrees, scale and shift are the most that the angle, the size (as a fraction) and
    the position (in pixels along each axis) change by. Returns (N, C, H, W); what comes in from outside is 0.
    """
    angle, size, dx, dy = torch.rand(4, len(images), device=images.device, generator=generator) * 2 - 1
    angle, size = angle * math.radians(degrees), 1 + size * scale
    cos, sin = angle.cos() / size, angle.sin() / size
    # affine_grid wants, for each output pixel, the input position it comes from; an image is 2 units wide there.
    dx, dy = dx * shift * 2 / images.shape[3], dy * shift * 2 / images.shape[2]
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)  # (N, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, H, W)


def draw_digits(count, generator):
    """Draw digits with Pillow's built-in font and bend each; return uint8 images (N, 28, 28) and labels (N,)."""
    font = ImageFont.load_default(size=24)
    digits = torch.zeros(10, 1, 28, 28)
    for digit in range(10):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), fill=255, font=font, anchor="mm")
        digits[digit] = pil_to_tensor(picture)
    labels = torch.randint(10, (count,), generator=generator)
    # Bent strongly, so that a network learns them about as fast as MNIST. In parts, to stay in the cache.
    bent = [
        random_affine(digits[part], degrees=30, scale=0.4, shift=4, generator=generator) for part in labels.split(500)
    ]
    return torch.cat(bent).round().to(torch.uint8).squeeze(1), labels


def read_dataset(name, data_dir):
    """Read a data set of torchvision's from `data_dir`, fetching it where it is missing.

    Returns ((images, labels), (images, labels)), training and test: uint8 (N, 28, 28) and int64 (N,).
    Raises UserError where the data set can neither be read nor fetched, and where its files are damaged.
    """
    dataset = DATASETS[name]
    folder = Path(data_dir).expanduser() / dataset.__name__
    try:
        splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
        for split in splits:
            if len(split.data) != len(split.targets):
                raise ValueError(f"{len(split.data)} images, but {len(split.targets)} labels")
            if split.data.shape[1:] != (28, 28) or split.targets.max() > 9:
                raise ValueError("not images of 28x28 pixels with labels from 0 to 9")
    except Exception as error:  # torchvision's reader has no error type of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        there = all((folder / "raw" / Path(file).stem).is_file() for file, _ in dataset.resources)
        if there and not isinstance(error, OSError):
            raise UserError(
                f"{folder} is damaged ({reason}); delete that folder and run again to fetch it anew"
            ) from error
        raise UserError(
            f"cannot read or fetch {dataset.__name__} ({reason}); name the folder that holds it with --data-dir, "
            "or train on drawn digits with --dataset synthetic"
        ) from error
    return [(split.data, split.targets) for split in splits]


class Loader:
    """Batches of images (N, 1, 28, 28) and labels (N,), cut from tensors that stay on their device.

    torch's DataLoader would copy a list of indices to the device for each batch, and wait for it. This one copies an
    order per pass. A generator shuffles each pass anew; without one, the order is that of the tensors.
    """

    def __init__(self, images, labels, batch_size, generator=None):
        self.images, self.labels, self.batch_size, self.generator = images, labels, batch_size, generator

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        if self.generator:
            order = torch.randperm(len(self.labels), generator=self.generator).to(self.labels.device)
        else:
            order = torch.arange(len(self.labels), device=self.labels.device)
        for indices in order.split(self.batch_size):
            yield self.images[indices], self.labels[indices]


def make_loaders(args):
    """Return the training and the test loader that the options ask for, their tensors on the device.

    Raises UserError where the data set cannot be had.
    """
    # A generator of its own: nothing else that draws random numbers changes the digits or their order.
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset == "synthetic":
        train, test = [draw_digits(count, generator) for count in (60_000, 10_000)]
    else:
        train, test = read_dataset(args.dataset, args.data_dir)

    def on_device(images, labels):
        return images.unsqueeze(1).to(args.device).float().div_(255), labels.to(args.device)

    train_images, train_labels = on_device(*(tensor[: args.limit] for tensor in train))
    train_loader = Loader(train_images, train_labels, args.batch_size, generator)
    return train_loader, Loader(*on_device(*test), TEST_BATCH_SIZE)


def set_seed(seed):
    """Seed torch on every device, and let CUDA use only algorithms that give the same bits each time."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    # Wanted for LSTMs, see the warning in https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")


# ---- evaluation and report ----


def describe(args, model, train_loader, test_loader):
    """Return the line that says what is trained, on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"Device: {args.device}, Model: {type(model).__name__} ({parameters:,} parameters), Data: {args.dataset} "
        f"({len(train_loader.labels):,} training and {len(test_loader.labels):,} test images)"
    )


def clock(device):
    """Return the time in seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def check_finite(loss, epoch, step):
    """Raise UserError where the loss, a tensor of one element, is nan or infinite."""
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()} at epoch {epoch}, step {step}; try a smaller --lr")


@torch.no_grad()
def evaluate(model, loader):
    """Return how well `model` does on `loader`, and leave both the model's mode and the random state as they were.

    model: maps images to logits (N, C). loader: any iterable of batches (images, labels (N,)), on any device.
    Returns the mean cross-entropy per sample, the accuracy in [0, 1], and the confusion matrix, int64 (C, C) on the
    CPU with a row per true and a column per predicted class. Raises ValueError where the loader has no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    where = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed in each pass
            batches = [(model(images.to(where)), labels.to(where)) for images, labels in loader]
    finally:
        for module, mode in modes:
            module.training = mode
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (N, C), (N,)
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
    return F.cross_entropy(logits, labels).item(), confusion.trace().item() / len(labels), confusion


def per_class(confusion):
    """Return precision, recall, F1 and count of each class, each (C,), from a confusion matrix (rows true).

    A quotient of nothing, such as the precision of a class that was never predicted, is 0.
    """
    hits, predicted, count = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    f1 = 2 * hits / (predicted + count).clamp(min=1)  # the harmonic mean of the other two
    return hits / predicted.clamp(min=1), hits / count.clamp(min=1), f1, count


def print_table(confusion):
    """Print precision, recall, F1 and count of each class."""
    print(f"{'Class':<8}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for label, (precision, recall, f1, count) in enumerate(zip(*per_class(confusion), strict=True)):
        print(f"{label:<8}{precision:>10.4f}{recall:>10.4f}{f1:>10.4f}{count:>10}")
