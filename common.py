"""What cnn_mnist.py and rnn_mnist.py both need, in the order of the flow.

The data goes one way: options -> device -> data -> the script's training loop -> evaluate -> report.
A split is two tensors that stay on the device: images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64.
"""

import argparse
import contextlib
import ctypes
import io
import math
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
# Small enough for the activations of a batch to stay in a processor's cache.
TEST_BATCH_SIZE = 200
SIZES = ("hidden", "layers")  # the options that give a network its size, kept with its weights


# ---- the process ----


class UserError(Exception):
    """A mistake that the user can correct; the text says what is wrong and what to do."""


def reason(error):
    """Return in one line what an exception says; for an OSError, the operating system's words alone."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def run(main):
    """Run main() as a process: exit with 1 and one `error:` line for what a user can mend, with 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # a pipe shows progress while it happens
    try:
        main()
    except KeyboardInterrupt as error:
        # What main() had got to is in its frame, if it had begun.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is main.__code__]
        args = frames[0].f_locals.get("args") if frames else None
        print(f"Interrupted. {args.last_saved if args else ''}".strip(), file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # At exit Python writes what stdout still holds: where stdout is what failed, that would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has seen enough, as in `| head -1`, wants no message.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {error}")
    except RuntimeError as error:  # torch has no error of its own for a CPU without enough memory
        if not any(words in str(error) for words in ("out of memory", "allocate memory", "Storage size")):
            raise
        sys.exit("error: out of memory; use a smaller --batch-size or a smaller network")


def prepare_process(seed):
    """Seed torch on every device, let CUDA use only algorithms that give the same bits each time, and keep memory."""
    keep_memory()
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    # Wanted for LSTMs, see the warning in https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")


def keep_memory():
    """Let malloc keep the memory that a training step frees, for the next step. Does nothing where libc is not glibc.

    By default glibc can give it back after each step; Linux then clears each page anew when it is asked for it again.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # see mallopt(3); the numbers are those in glibc's malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which would end when the block is freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is kept, however much of it is free


@contextlib.contextmanager
def lstm_kernels(args):
    """Context for an LSTM's forward pass, in which torch takes kernels that this machine has.

    On a CPU, torch leaves an LSTM to the library oneDNN, which cannot compute one in bfloat16 without the processor's
    AVX-512 instructions and stops with an error. torch's own kernels are slower, and run everywhere.
    """
    former = torch.backends.mkldnn.enabled  # mkldnn is oneDNN's former name
    if args.amp and args.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = former


def clock(device):
    """Return the time in seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# ---- options ----


def at_least(minimum):
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

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(0), default=10, metavar="N", help="passes; 0 evaluates only (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=100, metavar="N", help="images per step (default: %(default)s)")
    add("--lr", type=learning_rate, help="learning rate of Adam (default: 0.001, with --one-cycle a peak of 0.01)")
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it to 0, step by step")
    add("--augment", action="store_true", help="turn, scale and shift each training image a little, at random")
    add("--amp", action="store_true", help="bfloat16 mixed precision; can be much slower on a CPU without bfloat16")
    add("--seed", type=at_least(0), default=0, metavar="N", help="repeats a run exactly (default: %(default)s)")
    device_help = "cpu, cuda, cuda:1, mps, ...; auto is the accelerator, else the CPU (default: %(default)s)"
    add("--device", type=find_device, default="auto", metavar="NAME", help=device_help)

    add = parser.add_argument_group("data").add_argument
    names = [*DATASETS, "synthetic"]
    add("--dataset", choices=names, default="mnist", metavar="NAME", help=f"{', '.join(names)} (default: %(default)s)")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are kept (default: %(default)s)")
    add("--limit", type=at_least(1), metavar="N", help="train on the first N training images (default: all)")

    add = parser.add_argument_group("results").add_argument
    add("--save", metavar="FILE", help="write the weights after each epoch")
    add("--load", metavar="FILE", help="start from the weights in a file that --save wrote")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: say which digit each picture shows, train nothing")
    add("--errors", metavar="FILE", help="afterwards: a picture of test images that the network gets wrong")
    return parser


def parse_args(parser, argv):
    """Return the options in `argv`, completed: --lr by --one-cycle, the network's sizes by the file to --load.

    `args.saved` is what that file holds, or None, and `args.last_saved` says what --save has written so far. Raises
    UserError where a file that an option names cannot serve.
    """
    args = parser.parse_args(argv)
    if args.predict and not args.load:
        parser.error("argument --predict: needs the weights of a trained network, see --load")
    saved = read_saved(args.load) if args.load else None
    if saved:
        args = parser.parse_args(argv, argparse.Namespace(**saved["sizes"]))  # these count as defaults
    args.saved, args.last_saved = saved, ""
    args.lr = args.lr or (0.01 if args.one_cycle else 0.001)
    if args.save:
        write_file(args.save, Path.touch, trial=True)
    if args.errors:
        write_file(args.errors, Image.new("RGB", (1, 1)).save, trial=True)
    return args


# ---- data ----


def random_affine(images, degrees=10, scale=0.1, shift=3, generator=None):
    """Turn, scale and shift each image at random, each in its own way, on the device that they are on.

    images: (N, C, H, W) float. degrees, scale and shift are the most that the angle, the size (as a fraction) and
    the position (in pixels along each axis) change by. Returns (N, C, H, W); what comes in from outside is 0.
    """
    angle, size, dx, dy = torch.rand(4, len(images), device=images.device, generator=generator) * 2 - 1
    angle, size = angle * math.radians(degrees), 1 + size * scale
    cos, sin = angle.cos() / size, angle.sin() / size
    # affine_grid wants, for each output pixel, the input position it comes from; an image is 2 units wide and 2 units
    # high there, so that where it is not square, a turn has to change units from one axis to the other.
    height, width = images.shape[2:]
    dx, dy = dx * shift * 2 / width, dy * shift * 2 / height
    theta = torch.stack([cos, -sin * (height / width), dx, sin * (width / height), cos, dy], dim=1)
    theta = theta.view(-1, 2, 3)  # (N, 2, 3)
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
    images = torch.cat([random_affine(digits[part], 30, 0.4, 4, generator) for part in labels.split(500)])
    return images.round().to(torch.uint8).squeeze(1), labels


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
        there = all((folder / "raw" / Path(file).stem).is_file() for file, _ in dataset.resources)
        if there and not isinstance(error, OSError):
            advice = f"{folder} is damaged ({reason(error)}); delete that folder and run again to fetch it anew"
        else:
            advice = (
                f"{folder} cannot be read or fetched ({reason(error)}); name the folder that holds "
                f"{dataset.__name__} with --data-dir, or train on drawn digits with --dataset synthetic"
            )
        raise UserError(advice) from error
    return [(split.data, split.targets) for split in splits]


class Data(NamedTuple):
    """What a script trains and evaluates on, and the words for it in all that is printed, drawn and saved."""

    train_loader: Any  # an iterable of batches: images (N, C, H, W) or whatever the network takes, and labels (N,)
    test_loader: Any
    classes: list  # a name for each output of the network
    name: str = "data of your own"


def load_data(args):
    """Return the Data that the options ask for, its tensors on the device.

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

    train_loader = Loader(*on_device(*(tensor[: args.limit] for tensor in train)), args.batch_size, generator)
    # MNIST itself calls its classes "0 - zero" and so on.
    named = args.dataset in ("fashion-mnist", "kmnist")
    classes = DATASETS[args.dataset].classes if named else list("0123456789")
    return Data(train_loader, Loader(*on_device(*test), TEST_BATCH_SIZE), classes, args.dataset)


class Loader:
    """Batches of images (N, 1, 28, 28) and labels (N,), cut from tensors that stay on their device.

    torch's DataLoader would copy a list of indices to the device for each batch, and wait for it. This one copies an
    order per pass. A generator shuffles each pass anew; without one, the order is that of the tensors.
    """

    def __init__(self, images, labels, batch_size, generator=None):
        self.dataset, self.batch_size, self.generator = TensorDataset(images, labels), batch_size, generator

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        count = len(self.dataset)
        order = torch.randperm(count, generator=self.generator) if self.generator else torch.arange(count)
        for indices in order.to(self.dataset.tensors[0].device).split(self.batch_size):
            yield self.dataset[indices]


# ---- evaluation and report ----


@torch.no_grad()
def predict(model, loader):
    """Return the logits (N, C) and the labels (N,) of all samples, on the model's device.

    model: maps images to logits (N, C). loader: any iterable of batches (images, labels (N,)), on any device. Leaves
    the model's mode and the random state as they were. Raises ValueError where the loader has no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed in each pass
            batches = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    finally:
        for module, mode in modes:
            module.training = mode
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


class Evaluation(NamedTuple):
    """What evaluate returns."""

    loss: float  # the mean cross-entropy per sample
    accuracy: float  # in [0, 1]
    confusion: torch.Tensor  # (C, C), int64 on the CPU: a row per true, a column per predicted class
    logits: torch.Tensor  # (N, C)


def evaluate(model, loader):
    """Return the Evaluation of the model on all samples. The parameters and errors are those of predict."""
    logits, labels = predict(model, loader)
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
    accuracy = confusion.trace().item() / len(labels)
    return Evaluation(F.cross_entropy(logits, labels).item(), accuracy, confusion, logits)


def per_class(confusion):
    """Return precision, recall, F1 and count of each class, each (C,), from a confusion matrix (rows true).

    A quotient of nothing, such as the precision of a class that was never predicted, is 0.
    """
    hits, predicted, count = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    f1 = 2 * hits / (predicted + count).clamp(min=1)  # the harmonic mean of the other two
    return hits / predicted.clamp(min=1), hits / count.clamp(min=1), f1, count


def print_table(confusion, classes):
    """Print precision, recall, F1 and count of each class."""
    print(f"{'Class':<12}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for name, precision, recall, f1, count in zip(classes, *per_class(confusion), strict=True):
        print(f"{name:<12}{precision:>10.4f}{recall:>10.4f}{f1:>10.4f}{count:>10}")


def print_header(args, model, data):
    """Print the line that says what is trained, on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Device: {args.device}, Model: {type(model).__name__} ({parameters:,} parameters), Data: {data.name} "
        f"({len(data.train_loader.dataset):,} training and {len(data.test_loader.dataset):,} test images)"
    )


def check_finite(loss, epoch, step):
    """Raise UserError where the loss, a tensor of one element, is nan or infinite."""
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()} at epoch {epoch}, step {step}; try a smaller --lr")


def scores(evaluation):
    """Return the words for an Evaluation's loss and accuracy."""
    return f"Test loss: {evaluation.loss:.4f}, Test accuracy: {evaluation.accuracy:.2%}"


def report(args, data, evaluation):
    """Print the closing report on the last Evaluation, and draw the mistakes where --errors asks for them."""
    print("Training finished." if args.epochs else scores(evaluation))
    print_table(evaluation.confusion, data.classes)
    if args.errors:
        draw_errors(args.errors, evaluation.logits, data.test_loader, data.classes)


def draw_errors(file, logits, loader, classes):
    """Draw up to 100 images that the model gets wrong, the most confident mistake first.

    logits: (N, C), what the model says of the images in `loader`, which come in the same order in each pass. The
    ending of `file` says in which format. Raises UserError where it cannot be written.
    """
    images, labels = (torch.cat(batches).to(logits.device) for batches in zip(*loader, strict=True))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    if not len(wrong):
        print(f"No mistakes, so {file} is not written.")
        return
    font, cells = ImageFont.load_default(size=13), []
    for i in wrong[confidence[wrong].argsort(descending=True)][:100].tolist():
        cell = Image.new("L", (120, 140), "white")
        cell.paste(to_pil_image(images[i]).resize((84, 84), Image.Resampling.NEAREST), (18, 4))
        text = f"true: {classes[labels[i]]}\nsaid: {classes[predicted[i]]}\n{confidence[i]:.1%} sure"
        ImageDraw.Draw(cell).multiline_text((18, 90), text, fill="black", font=font, spacing=2)
        cells.append(pil_to_tensor(cell))
    write_file(file, to_pil_image(make_grid(cells, nrow=10, pad_value=255)).save)
    print(f"{file} shows {len(cells)} of {len(wrong)} mistakes.")


# ---- saved weights ----


def write_file(file, write, trial=False):
    """Let write(path) write `file`, which is replaced as a whole or not at all; a trial leaves it as it is.

    Raises UserError where the file cannot be written.
    """
    path = Path(file).resolve()
    # Beside it, as only a move within a file system is one step; with its ending, from which Pillow takes the format.
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        write(part)
        if not trial:
            part.replace(path)
    except (OSError, ValueError) as error:  # ValueError: Pillow does not know the ending
        raise UserError(f"cannot write {file} ({reason(error)}); name another place") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def network(model, args):
    """Return the name of a network and the options that give it its size, as they are kept with its weights."""
    return {"model": type(model).__name__, "sizes": {name: getattr(args, name) for name in SIZES if name in args}}


def save_weights(model, args, data, epoch):
    """Write to --save the weights and what is needed to build and use the network again; see write_file."""
    buffer = io.BytesIO()  # where torch itself writes to a full disk, its error does not say so
    torch.save({**network(model, args), "classes": data.classes, "weights": model.state_dict()}, buffer)
    write_file(args.save, lambda path: path.write_bytes(buffer.getvalue()))
    args.last_saved = f"{args.save} holds the weights after epoch {epoch}."


def read_saved(file):
    """Return what save_weights wrote to `file`, its tensors on the CPU. Raises UserError for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the file is an error anyway
            saved = torch.load(file, map_location="cpu", weights_only=True)  # data only: no code in it is run
        if set(saved) != {"model", "sizes", "classes", "weights"}:
            raise ValueError("other content")
    except OSError as error:
        raise UserError(f"cannot read {file} ({reason(error)}); --load takes a file that --save wrote") from error
    except Exception as error:  # depending on where the file is odd, torch.load raises about anything
        raise UserError(f"{file} is damaged, or no file that --save wrote; train again with --save") from error
    return saved


def load_weights(model, args):
    """Give the model the weights from --load. Raises UserError where they are those of another network."""

    def words(network):
        return " ".join([network["model"], *(f"--{name} {size}" for name, size in network["sizes"].items())])

    held, wanted = words(args.saved), words(network(model, args))
    try:
        if held != wanted:
            raise RuntimeError(f"this is {wanted}")
        model.load_state_dict(args.saved["weights"])
    except RuntimeError as error:
        advice = "use the script and the options that it was trained with, or train again with --save"
        raise UserError(f"{args.load} holds {held}, which does not fit here: {reason(error)}; {advice}") from error


# ---- pictures of your own ----


def grey_levels(image):
    """Return a Pillow image as grey levels (H, W), float in [0, 255]; what is transparent becomes paper."""
    if image.has_transparency_data:
        grey, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).float()  # each (H, W)
        drawn = grey[alpha > 127].median()
        # Paper like most of the picture; where most of it is transparent, in contrast to what is drawn on it.
        paper = drawn if (alpha > 127).float().mean() > 0.5 else 255 * (drawn < 128)
        return paper + (grey - paper).nan_to_num() * alpha / 255
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel
        grey = pil_to_tensor(image)[0].float()
        return grey * 255 / grey.max().clamp(min=1)
    return pil_to_tensor(image.convert("L"))[0].float()


def scale_to(images, longest):
    """Return images (N, C, H, W) scaled so that the longer side has `longest` pixels."""
    size = [max(1, round(side * longest / max(images.shape[2:]))) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def mnist_form(grey):
    """Bring the digit in a picture into the form of MNIST's: grey levels (H, W) in [0, 255] to (1, 28, 28) in [0, 1].

    The digit may be dark on light or the reverse, of any size, anywhere. As in LeCun, Bottou, Bengio and Haffner,
    "Gradient-based learning applied to document recognition" (1998), it is scaled to fit 20x20 pixels, and moved until
    its centre of mass is the centre: pixel (14, 14), as it is in MNIST's files. Raises ValueError where there is none.
    """
    grey = grey[None, None]  # (1, 1, H, W)
    if max(grey.shape) > 256:
        grey = scale_to(grey, 256)  # enough for a digit of 20 pixels, with less noise
    if grey.median() - grey.min() < grey.max() - grey.median():  # more paper than ink: the paper is dark
        grey = 255 - grey
    # The paper's level, which need not be the same everywhere: a grid of 16x16 in which what is darker than all around
    # is filled in (a morphological closing), blurred.
    closed = -F.max_pool2d(-F.max_pool2d(F.adaptive_max_pool2d(grey, 16), 5, 1, 2), 5, 1, 2)
    blurred = F.avg_pool2d(closed, 3, 1, 1, count_include_pad=False)
    ink = F.interpolate(blurred, size=grey.shape[2:], mode="bilinear") - grey
    ink = ink - ink.median()
    noise = 1.4826 * ink.abs().median()  # the median absolute deviation, scaled to a standard deviation
    if ink.max() < 8 * noise + 12:
        raise ValueError("there is nothing on it")
    ink = ((ink - 4 * noise) / (ink.max() - 4 * noise)).clamp(0, 1)
    drawn = ink[0, 0] > 0.25
    rows, columns = drawn.any(dim=1).nonzero(), drawn.any(dim=0).nonzero()
    digit = scale_to(ink[:, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1], 20)
    digit = digit / digit.max()
    height, width = digit.shape[2:]
    mass = digit[0, 0] / digit.sum()
    top = round(14 - (mass.sum(dim=1) @ torch.arange(0.0, height)).item())
    left = round(14 - (mass.sum(dim=0) @ torch.arange(0.0, width)).item())
    top, left = min(max(top, 0), 28 - height), min(max(left, 0), 28 - width)
    return F.pad(digit[0], (left, 28 - width - left, top, 28 - height - top))


def read_picture(file):
    """Return the digit in a picture file as mnist_form gives it. Raises UserError where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return mnist_form(grey_levels(ImageOps.exif_transpose(Image.open(file))))
    except Exception as error:  # a broken picture makes Pillow raise about anything
        raise UserError(f"cannot read a digit from {file}: {reason(error)}") from error


def predict_pictures(model, args):
    """Print for each picture of --predict the class that the model gives it, and how sure it is.

    Raises UserError, after all the others have been answered, for those that show nothing.
    """
    failures = []
    for file in args.predict:
        try:
            image = read_picture(file)
        except UserError as error:
            failures.append(str(error))
            continue
        logits, _ = predict(model, [(image.unsqueeze(0), torch.empty(1))])  # nobody knows the label
        confidence, label = logits[0].softmax(dim=0).max(dim=0)
        print(f"{file}: {args.saved['classes'][label]} ({confidence:.1%})")
    if failures:
        raise UserError("; ".join(failures))
