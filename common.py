"""What cnn_mnist.py and rnn_mnist.py both need, in the order of the flow.

The data goes one way: options -> device -> data -> the script's training loop -> evaluate -> report.
A split is two tensors that stay on the device: images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64.
"""

import argparse
import builtins
import contextlib
import ctypes
import errno
import io
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
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
OUT_OF_MEMORY = "out of memory; use a smaller --batch-size, a smaller --limit or a smaller network"


# ---- the process ----


class UserError(Exception):
    """A mistake that the user can correct; the text says what is wrong and what to do."""

    def _render_traceback_(self):  # what a notebook shows of it
        return [f"error: {self}"]


def reason(error):
    """Return in one line what an exception says; for an OSError, the operating system's words alone."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def short_of_memory(error):
    """Return whether an exception says that there is not enough memory, for which torch has many words."""
    words = "out of memory|allocate|bad.alloc|alloc_failed|storage size|create a primitive|overflow when unpacking"
    if isinstance(error, (RuntimeError, TypeError)):
        return bool(re.search(words, str(error).partition("\n")[0], re.IGNORECASE))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def explain(error, advice):
    """Return the UserError for an exception: with the advice, but where memory is short, with what helps there."""
    return UserError(OUT_OF_MEMORY if short_of_memory(error) else advice)


def run(main):
    """Run main() as a program and return its model; where it fails, end Python with its message and exit status.

    The status is 1, with an `error:` line, for what a user can correct, and 130 after Ctrl-C. Where Python goes on, as
    in a notebook, it is not ended: after Ctrl-C the model is returned as it then is.
    """
    with contextlib.suppress(AttributeError):  # a notebook's or an IDE's stdout needs no setting and has none
        # A pipe shows progress while it happens; a file name that the terminal's encoding lacks does not stop a run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    model = None
    try:
        return main()
    except KeyboardInterrupt as error:
        # What main() had got to is in its frame, if it had begun.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is main.__code__]
        found = frames[0].f_locals if frames else {}
        model, args = found.get("model"), found.get("args")
        status, message = 130, f"Interrupted. {args.last_saved if args else ''}".strip()
    except Exception as error:
        if isinstance(error, OSError):
            stop_if_stdout_fails(error)
        if not isinstance(error, UserError) and not short_of_memory(error):
            raise  # a mistake in the program: its traceback says where
        error = explain(error, str(error))
        if hasattr(builtins, "__IPYTHON__"):
            raise error from None  # a notebook shows it in one line, and does not go on to its next cell
        status, message = 1, f"error: {error}"
    print(message, file=sys.stderr)
    if hasattr(sys, "ps1") or sys.flags.interactive or "idlelib.run" in sys.modules:
        return model
    sys.exit(status)


def stop_if_stdout_fails(error):
    """End Python with status 1 where an OSError came from writing to stdout."""
    try:
        print(end="", flush=True)
    except OSError:
        # At exit Python writes what stdout still holds, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has seen enough, as in `| head -1`, wants no message.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {error}")


def prepare_process(seed):
    """Seed torch on every device, let a GPU use only algorithms that give the same bits each time, and keep memory."""
    keep_memory()
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = torch.backends.mkldnn.deterministic = True  # mkldnn: Intel's GPUs
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


def file_name(text):
    """argparse type: a name that is not empty, as a shell variable is that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def find_device(name):
    """argparse type: the torch.device called `name`, for `auto` the machine's accelerator, else the CPU."""
    names = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator().type
        names = [accelerator, *(f"{accelerator}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]
    device = names[0] if name == "auto" else name
    try:
        if device.startswith("cuda"):
            if not torch.backends.cuda.is_built():
                raise ValueError("this PyTorch has no CUDA; install one that has, see https://pytorch.org/get-started")
            torch.cuda.init()  # fails, and says why, without a GPU, without its driver, and with one that is too old
        if device not in names:
            raise ValueError("it is not on this machine")
        (torch.ones(1, device=device) + 1).item()  # fails on a GPU for which this PyTorch was not built
    except Exception as error:
        why = str(error).partition("\n")[0]
        if name != "auto":
            advice = f"{name!r} cannot be used: {why}; choose from auto, {', '.join(names)}"
            raise argparse.ArgumentTypeError(advice) from error
        print(f"{device} cannot be used: {why}; taking the CPU", file=sys.stderr)
        device = "cpu"
    return torch.device(device)


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
    add("--data-dir", type=file_name, default="data", metavar="DIR", help="folder of data sets (default: %(default)s)")
    add("--limit", type=at_least(1), metavar="N", help="train on the first N training images (default: all)")
    add("--validate", type=at_least(1), metavar="N", help="hold out the last N training images, and test on them alone")

    add = parser.add_argument_group("results").add_argument
    add("--log", type=file_name, metavar="FILE", help="write losses and accuracy of each epoch, as a table (CSV)")
    add("--save", type=file_name, metavar="FILE", help="write the weights after each epoch")
    add("--load", type=file_name, metavar="FILE", help="start from the weights in a file that --save wrote")
    add("--predict", type=file_name, nargs="+", metavar="IMAGE", help="with --load: name the digit in each picture")
    add("--errors", type=file_name, metavar="FILE", help="afterwards: a picture of images that the network gets wrong")
    return parser


def parse_args(parser, argv):
    """Return the options in `argv`, completed: --lr by --one-cycle, the network's sizes by the file to --load.

    `args.saved` is what that file holds, or None; `args.last_saved` says what --save has written so far, and
    `args.log_rows` is what --log has. Raises UserError where a file that an option names cannot serve.
    """
    if argv is None and sys.argv[0].endswith("kernel_launcher.py"):
        argv = []  # in a notebook the command line is that of its kernel
    args = parser.parse_args(argv)
    if args.predict and not args.load:
        parser.error("argument --predict: needs the weights of a trained network, see --load")
    if args.predict and (args.log or args.save or args.errors):
        parser.error("argument --predict: trains and evaluates nothing that --log, --save or --errors could keep")
    if not args.epochs and (args.log or args.save):
        parser.error("argument --epochs: 0 trains nothing that --log or --save could keep")
    weights = {os.path.realpath(file) for file in (args.save, args.load) if file}
    files = [*weights, *(os.path.realpath(file) for file in (args.log, args.errors) if file)]
    if len(set(files)) < len(files):
        parser.error("--log and --errors need a file each, and not that of --save or --load")
    saved = read_saved(args.load) if args.load else None
    if saved:
        sizes = {name: size for name, size in saved["sizes"].items() if name in args}
        args = parser.parse_args(argv, argparse.Namespace(**sizes, device=args.device))  # these count as defaults
    args.saved, args.last_saved, args.log_rows = saved, "", []
    args.lr = args.lr or (0.01 if args.one_cycle else 0.001)
    for file, write in (args.log, Path.touch), (args.save, Path.touch), (args.errors, Image.new("RGB", (1, 1)).save):
        if file:
            write_file(file, write, trial=True)
    return args


# ---- data ----


def random_affine(images, degrees=10, scale=0.1, shift=2, generator=None):
    """Turn, scale and shift each image at random, each in its own way, on the device that they are on.

    images: (N, C, H, W) float. degrees, scale and shift are the most that the angle, the size (as a fraction) and
    the position (in pixels along each axis) change by. Returns (N, C, H, W); what comes in from outside is 0. Raises
    UserError for what has no such shape.
    """
    if images.dim() != 4:
        raise UserError(f"--augment takes images (N, C, H, W), not {tuple(images.shape)}; train without it")
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
    folder = Path(os.path.expanduser(data_dir)) / dataset.__name__
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
        raise explain(error, advice) from error
    return [(split.data, split.targets) for split in splits]


class Data(NamedTuple):
    """What a script trains and evaluates on, and the words for it in all that is printed, drawn and saved."""

    train_loader: Any  # an iterable of batches: inputs (N, ...) as the network takes them, and labels (N,)
    eval_loader: Any  # the same, in the same order in each pass
    classes: list  # a name for each output of the network
    name: str = "data of your own"
    split: str = "test"  # what eval_loader holds


def load_data(args):
    """Return the Data that the options ask for, its tensors on the device.

    Raises UserError where the data set cannot be had, and where --validate leaves nothing to train on.
    """
    # A generator of its own: nothing else that draws random numbers changes the digits or their order.
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset == "synthetic":
        train, evaluated = [draw_digits(count, generator) for count in (60_000, 10_000)]
    else:
        train, evaluated = read_dataset(args.dataset, args.data_dir)
    if args.validate:
        kept = len(train[1]) - args.validate
        if kept < 1:
            raise UserError(f"--validate {args.validate} leaves none of {len(train[1])} training images to train on")
        train, evaluated = [tensor[:kept] for tensor in train], [tensor[kept:] for tensor in train]
    train_loader = Loader(
        *on_device(*(tensor[: args.limit] for tensor in train), args.device), args.batch_size, generator
    )
    eval_loader = Loader(*on_device(*evaluated, args.device), TEST_BATCH_SIZE)
    # MNIST's own names are "0 - zero" and so on.
    classes = [name.partition(" - ")[0] for name in DATASETS.get(args.dataset, datasets.MNIST).classes]
    return Data(train_loader, eval_loader, classes, args.dataset, "validation" if args.validate else "test")


# ---- loaders and evaluation; needs nothing else of this file, for a program of one file ----


def on_device(images, labels, device):
    """Return uint8 images (N, H, W) as float (N, 1, H, W) in [0, 1], and labels (N,), both on the device."""
    return images.unsqueeze(1).to(device).float().div_(255), labels.to(device)


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


def print_report(confusion, classes):
    """Print precision, recall, F1 and count of each class, and the confusion matrix (C, C) below."""
    width = max(12, *(len(name) + 2 for name in classes))
    print(f"{'Class':<{width}}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for name, precision, recall, f1, count in zip(classes, *per_class(confusion), strict=True):
        print(f"{name:<{width}}{precision:>10.4f}{recall:>10.4f}{f1:>10.4f}{count:>10}")
    print("Confusion matrix, a row per true class, a column per predicted class:")
    column = max(6, len(str(confusion.max().item())) + 2)
    for name, row in [("", [name[: column - 1] for name in classes]), *zip(classes, confusion.tolist(), strict=True)]:
        print(f"{name:<{width}}" + "".join(f"{count:>{column}}" for count in row))


# ---- report ----


def print_header(args, model, data):
    """Print the line that says what is trained, on what. Raises UserError where network and classes do not fit."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed in each pass
        batch = next(iter(data.eval_loader))
    check_outputs(predict(model, [batch])[0], data.classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Device: {args.device}, Model: {type(model).__name__} ({parameters:,} parameters), Data: {data.name} "
        f"({len(data.train_loader.dataset):,} training and {len(data.eval_loader.dataset):,} {data.split} samples)"
    )


def check_outputs(logits, classes):
    """Raise UserError where logits (N, C) are not one for each class."""
    outputs = logits.shape[1]
    if outputs != len(classes):
        raise UserError(f"the network has {outputs} outputs, but {len(classes)} classes have a name; make them equal")


def check_finite(loss, epoch, step):
    """Raise UserError where the loss is nan or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at epoch {epoch}, step {step}; try a smaller --lr")


def scores(data, evaluation):
    """Return the words for an Evaluation's loss and accuracy."""
    split = data.split.capitalize()
    return f"{split} loss: {evaluation.loss:.4f}, {split} accuracy: {evaluation.accuracy:.2%}"


def log_epoch(args, data, epoch, train_loss, evaluation, seconds):
    """Write to --log the row of an epoch below those before it; see write_file. The losses are means per sample."""
    args.log_rows.append(f"{epoch},{train_loss:.6f},{evaluation.loss:.6f},{evaluation.accuracy:.6f},{seconds:.2f}\n")
    head = f"epoch,train_loss,{data.split}_loss,{data.split}_accuracy,seconds\n"
    write_file(args.log, lambda path: path.write_text(head + "".join(args.log_rows)))


def report(args, data, evaluation):
    """Print the closing report on the last Evaluation, and draw the mistakes where --errors asks for them."""
    print("Training finished." if args.epochs else scores(data, evaluation))
    print_report(evaluation.confusion, data.classes)
    if args.errors:
        draw_errors(args.errors, evaluation.logits, data.eval_loader, data.classes)


def draw_errors(file, logits, loader, classes):
    """Draw up to 100 images that the model gets wrong, the most confident mistake first.

    logits: (N, C), what the model says of the images in `loader`, which come in the same order in each pass: colour
    images (3, H, W), or grey ones, of which several, as (C, H, W), are drawn one below the other. Values outside [0, 1]
    are all scaled into it. The ending of `file` says in which format. Raises UserError where it cannot be written.
    """
    images, labels = (torch.cat(batches).to(logits.device) for batches in zip(*loader, strict=True))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    if not len(wrong):
        print(f"No mistakes, so {file} is not written.")
        return
    low, high = images.min().clamp(max=0), images.max().clamp(min=1)
    font, cells = ImageFont.load_default(size=13), []
    width = 36 + max(84, *(int(font.getlength(f"true: {name}")) for name in classes))
    for i in wrong[confidence[wrong].argsort(descending=True)][:100].tolist():
        image = (images[i] - low) / (high - low)
        grey = image.reshape(1, -1, image.shape[-1])
        picture = to_pil_image(image if image.shape[:-2] == (3,) else grey).convert("RGB")
        cell = Image.new("RGB", (width, 140), "white")
        cell.paste(ImageOps.pad(picture, (84, 84), Image.Resampling.BOX, "white"), (18, 4))
        text = f"true: {classes[labels[i]]}\nsaid: {classes[predicted[i]]}\n{confidence[i]:.1%} sure"
        ImageDraw.Draw(cell).multiline_text((18, 90), text, fill="black", font=font, spacing=2)
        cells.append(pil_to_tensor(cell))
    write_file(file, to_pil_image(make_grid(cells, nrow=10, pad_value=255)).save)
    print(f"{file} shows {len(cells)} of {len(wrong)} mistakes.")


# ---- files: saved weights ----


def regular_file(file):
    """Return the Path of a file, links followed. Raises OSError where it is there and is a folder, pipe or device."""
    path = Path(os.path.realpath(file))
    if path.is_symlink() or path.exists() and not path.is_file():  # still a link: one of a loop
        raise OSError("it is not a regular file")
    return path


def write_file(file, write, trial=False):
    """Let write(path) write `file`, which is replaced as a whole or not at all; a trial leaves it as it is.

    Raises UserError where the file cannot be written.
    """
    try:
        path = regular_file(file)
        # Beside it, as only a move within a file system is one step; with its name, whose ending is the format.
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent, ignore_cleanup_errors=True) as folder:
            part = Path(folder, path.name)
            write(part)
            if path.exists():
                shutil.copymode(path, part)  # what was private stays private
            if not trial:
                part.replace(path)
    except Exception as error:  # depending on the format, Pillow raises about anything
        why = "Pillow does not write this format" if isinstance(error, KeyError) else reason(error)
        raise explain(error, f"cannot write {file} ({why}); name another file") from error


def network(model, args):
    """Return the name of a network and the options that give it its size, as they are kept with its weights."""
    return {"model": type(model).__name__, "sizes": {name: getattr(args, name) for name in SIZES if name in args}}


def save_weights(model, args, data, epoch):
    """Write to --save the weights and what is needed to build and use the network again; see write_file.

    Raises UserError where a weight is not finite.
    """
    weights = model.state_dict()
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"the weights are not finite after epoch {epoch}, and not saved; try a smaller --lr")
    buffer = io.BytesIO()  # where torch itself writes to a full disk, its error does not say so
    torch.save({**network(model, args), "classes": list(data.classes), "weights": weights}, buffer)
    write_file(args.save, lambda path: path.write_bytes(buffer.getvalue()))
    args.last_saved = f"{args.save} holds the weights after epoch {epoch}."


def read_saved(file):
    """Return what save_weights wrote to `file`, its tensors on the CPU. Raises UserError for any other file."""
    try:
        content = io.BytesIO(regular_file(file).read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the file is an error anyway
            saved = torch.load(content, map_location="cpu", weights_only=True)  # data only: no code in it is run
            sizes, classes, weights = saved["sizes"], saved["classes"], saved["weights"]
        if not (
            zipfile.ZipFile(content).testzip() is None  # torch does not look at the sums over its content
            and saved.keys() == {"model", "sizes", "classes", "weights"}
            and isinstance(saved["model"], str)
            and all(name in SIZES and type(size) is int and 0 < size < 2**63 for name, size in sizes.items())
            and isinstance(classes, list)
            and all(isinstance(name, str) for name in classes)
            and all(isinstance(name, str) and tensor.isfinite().all() for name, tensor in weights.items())
        ):
            raise ValueError("other content")
    except OSError as error:
        raise explain(error, f"cannot read {file} ({reason(error)}); --load takes a file that --save wrote") from error
    except Exception as error:  # depending on where the file is odd, torch.load raises about anything
        advice = f"{file} is damaged, or no file that --save wrote; train again with --save"
        raise explain(error, advice) from error
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
        advice = f"{args.load} holds {held}, which does not fit here: {reason(error)}; {advice}"
        raise explain(error, advice) from error


# ---- pictures of your own ----


def grey_levels(image):
    """Return a Pillow image as grey levels (H, W), float in [0, 255]; what is transparent becomes paper.

    Raises ValueError where a pixel is not a finite number.
    """
    if image.has_transparency_data:
        grey, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).float()  # each (H, W)
        drawn = grey[alpha > 127].median()
        # Paper like most of the picture; where most of it is transparent, in contrast to what is drawn on it.
        paper = drawn if (alpha > 127).float().mean() > 0.5 else 255 * (drawn < 128)
        return paper + (grey - paper).nan_to_num() * alpha / 255
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel
        grey = pil_to_tensor(image.convert("F"))[0]
        if not grey.isfinite().all():
            raise ValueError("a pixel of it is not a finite number")
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

    The thresholds of noise (8, 12, 4) and of ink (0.25) were found by trial: with half or twice of any of them a CNN is
    right on as many of 1,000 training images, drawn on large pages, to within 0.2 points, and no blank page is a digit.
    """
    grey = scale_to(grey[None, None], 256)  # (1, 1, H, W); enough for a digit of 20 pixels, with less noise
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
    dark = grey[0, 0] < grey.min() + 0.25 * (grey.max() - grey.min())
    if any(edge.all() for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1])):
        raise ValueError("one of its edges is ink all along; cut it so that there is paper around the digit")
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
            # Pillow warns of a photo over 89 megapixels, and refuses one of twice that.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(regular_file(file))
            image.draft("L", (512, 512))  # from a larger JPEG, read no more than that takes
            return mnist_form(grey_levels(ImageOps.exif_transpose(image)))
    except Exception as error:  # a broken picture makes Pillow raise about anything
        raise explain(error, f"cannot read a digit from {file}: {reason(error)}") from error


def predict_pictures(model, args):
    """Print for each picture of --predict the class that the model gives it, and how sure it is.

    Raises UserError where the model does not take such pictures and, after all the others have been answered, for those
    that show nothing.
    """

    def classify(image):
        return predict(model, [(image.unsqueeze(0), torch.empty(1))])[0]  # nobody knows the label

    try:
        check_outputs(classify(torch.zeros(1, 28, 28)), args.saved["classes"])
    except RuntimeError as error:
        advice = f"--predict takes grey pictures of 28x28 pixels, which {args.load} is not for ({reason(error)})"
        raise explain(error, advice) from error
    failures = []
    for file in args.predict:
        try:
            confidence, label = classify(read_picture(file))[0].softmax(dim=0).max(dim=0)
        except UserError as error:
            failures.append(str(error))
        else:
            print(f"{file}: {args.saved['classes'][label]} ({confidence:.1%})")
    if failures:
        raise UserError("; ".join(failures))
