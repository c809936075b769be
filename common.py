"""What cnn_mnist.py and rnn_mnist.py both need, in the order of the flow.

The data goes one way: options -> device -> data -> the script's training loop -> evaluate -> report.
A split is two tensors that stay on the device: images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64.
"""

import argparse
import contextlib
import ctypes
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}


# ---- the process ----

# So a GPU gives the same bits each time, see https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
torch.backends.cudnn.deterministic = torch.backends.mkldnn.deterministic = True  # mkldnn: Intel's GPUs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")

# By default glibc's malloc gives the memory of a training step back, and Linux clears each page anew for the next.
with contextlib.suppress(OSError, AttributeError):  # another libc
    mallopt = ctypes.CDLL("libc.so.6").mallopt  # see mallopt(3); the numbers are those in glibc's malloc.h
    mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which would end when the block is freed
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is kept, however much of it is free


class UserError(Exception):
    """A mistake that the user can correct; the text says what is wrong and what to do."""

    def _render_traceback_(self):  # what a notebook shows of it
        return [f"error: {self}"]


def reason(error):
    """Return the first sentence of what an exception says, in one line of at most 200 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...").partition(". ")[0]


def run(main):
    """Run main() as a program and return what it returns; where it fails, end Python with one line and a status."""
    if not hasattr(sys.stdout, "reconfigure"):
        return main()  # a notebook or an IDE shows lines and errors in its own way, and goes on
    sys.stdout.reconfigure(line_buffering=True)  # a pipe shows progress while it happens
    try:
        return main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # sys.exit would first write what stdout still holds, and fail again


# ---- options ----


def positive(text):
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def find_device(name):
    """argparse type: the torch.device called `name`, for `auto` the machine's accelerator, else the CPU."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        (torch.ones(1, device=name) + 1).item()  # fails, and says why, without a driver, or on a GPU that is too old
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {reason(error)}; try --device cpu") from error
    return torch.device(name)


def make_parser(description):
    """Return an argparse parser with the options of both scripts; its help page begins with `description`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, metavar="N", help="passes; 0 evaluates only (default: %(default)s)")
    add("--batch-size", type=positive, default=100, metavar="N", help="images per step (default: %(default)s)")
    add("--lr", type=float, help="learning rate of Adam (default: 0.001, with --one-cycle a peak of 0.01)")
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it to 0, step by step")
    add("--augment", action="store_true", help="turn, scale and shift each training image a little, at random")
    add("--amp", action="store_true", help="bfloat16 mixed precision, where the device has it")
    add("--seed", type=int, default=0, metavar="N", help="repeats a run exactly (default: %(default)s)")
    add("--device", type=find_device, default="auto", metavar="NAME", help="cpu, cuda:1, mps, ...; auto prefers a GPU")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=[*DATASETS, "synthetic"], default="mnist", help="(default: %(default)s)")
    add("--data-dir", default="data", metavar="DIR", help="folder of data sets (default: %(default)s)")
    add("--limit", type=positive, metavar="N", help="train on the first N training images (default: all)")
    add("--validate", type=positive, metavar="N", help="hold out the last N training images, and test on them alone")

    add = parser.add_argument_group("results").add_argument
    add("--log", metavar="FILE", help="write losses and accuracy of each epoch, as a table (CSV)")
    add("--save", metavar="FILE", help="write the weights after each epoch, as a state dict")
    add("--load", metavar="FILE", help="start from the weights in a file that --save wrote")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: name the digit in each picture")
    add("--errors", metavar="FILE.png", help="afterwards: a picture of images that it gets wrong")
    return parser


def parse_args(parser, argv):
    """Return the options in the list `argv`, for None those of the command line, completed and found to go together."""
    if argv is None:
        argv = [] if sys.argv[0].endswith("kernel_launcher.py") else sys.argv[1:]  # a notebook's is its kernel's
    args = parser.parse_args([str(word) for word in argv])
    for file in filter(None, (args.save, args.log, args.errors)):
        if os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or "."):
            raise UserError(f"cannot write {file}: it is a folder, or its folder is not there; name another place")
    if args.lr is None:
        args.lr = 0.01 if args.one_cycle else 0.001
    if args.amp and args.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        parser.error("argument --amp: a CPU without AVX-512 is many times slower in bfloat16; train without it")
    if args.predict and not args.load:
        parser.error("argument --predict: needs the weights of a trained network, see --load")
    if args.errors and not args.errors.lower().endswith(".png"):
        parser.error("argument --errors: the picture is a PNG file; let its name end in .png")
    return args


# ---- data ----


def random_affine(images, degrees=10, scale=0.1, shift=2, generator=None):
    """Turn, scale and shift each image at random, each in its own way, on the device that they are on.

    images: (N, C, H, W) float, as is what it returns; what comes in from outside is 0. degrees, scale (a fraction) and
    shift (in pixels along each axis) are the most that the angle, the size and the position change by.
    """
    angle, size, dx, dy = torch.rand(4, len(images), device=images.device, generator=generator) * 2 - 1
    angle, size = angle * math.radians(degrees), 1 + size * scale
    cos, sin = angle.cos() / size, angle.sin() / size
    # affine_grid wants, for each output pixel, the input position it comes from; an image is 2 units wide and 2 units
    # high there, so that where it is not square, a turn has to change units from one axis to the other.
    height, width = images.shape[2:]
    dx, dy = dx * shift * 2 / width, dy * shift * 2 / height
    theta = torch.stack([cos, -sin * (height / width), dx, sin * (width / height), cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, H, W)


def draw_digits(count, generator):
    """Draw digits with Pillow's built-in font and bend each; return uint8 images (N, 28, 28) and labels (N,)."""
    pictures = [Image.new("L", (28, 28)) for _ in range(10)]
    for digit, picture in enumerate(pictures):
        ImageDraw.Draw(picture).text((14, 14), str(digit), fill=255, anchor="mm", font_size=24)
    digits = torch.stack([pil_to_tensor(picture) for picture in pictures]).float()  # (10, 1, 28, 28)
    labels = torch.randint(10, (count,), generator=generator)
    # Bent strongly, so that a network learns them about as fast as MNIST. In parts, to stay in the cache.
    images = torch.cat([random_affine(digits[part], 30, 0.4, 4, generator) for part in labels.split(500)])
    return images.round().to(torch.uint8).squeeze(1), labels


def read_dataset(name, data_dir):
    """Read a data set of torchvision's from `data_dir`, fetching what is missing there.

    Returns ((images, labels), (images, labels)), training and test: uint8 (N, 28, 28) and int64 (N,). Raises UserError
    where a file can neither be found nor fetched, cannot be read, or holds other data.
    """
    dataset = DATASETS[name]
    folder = Path(os.path.expanduser(data_dir), dataset.__name__, "raw")
    tensors = []
    for archive, _ in dataset.resources:
        file = folder / archive.removesuffix(".gz")
        try:
            if not os.path.isfile(file):
                dataset(data_dir, download=True)
            tensors.append(datasets.mnist.read_sn3_pascalvincent_tensor(file))
        except Exception as error:  # neither the download nor the reader of torchvision has an error type of its own
            why = f"it is not there, and cannot be fetched: {reason(error)}; see --data-dir, or --dataset synthetic"
            if os.path.isfile(file):
                why = "it is unreadable, or no whole IDX file; if it is being fetched run again, else move it away"
            raise UserError(f"cannot read {file}: {why}") from error
    splits = [(tensors[0], tensors[1].long()), (tensors[2], tensors[3].long())]
    for images, labels in splits:
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
            held = f"images {tuple(images.shape)} and labels {tuple(labels.shape)} up to {labels.max()}"
            raise UserError(f"{folder} holds {held}, not (N, 28, 28) and (N,) up to 9; see 'Own data' in README.md")
    return splits


class Data:
    """What a script trains and evaluates on, and the words for it in all that is printed, drawn and saved.

    train_loader: an iterable of batches: inputs (N, ...) as the network takes them, and labels (N,). eval_loader: the
    same, in the same order in each pass. classes: a name for each output of the network. split: what eval_loader holds.
    """

    def __init__(self, train_loader, eval_loader, classes, name="data of your own", split="test"):
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.classes, self.name, self.split = list(map(str, classes)), name, split


def class_names(dataset):
    """Return the names of the classes of a data set that --dataset names; MNIST's own are "0 - zero" and so on."""
    return [name.partition(" - ")[0] for name in DATASETS.get(dataset, datasets.MNIST).classes]


def load_data(args):
    """Return the Data that the options ask for, on the device. Raises UserError where the data set cannot be had."""
    # A generator of its own: nothing else that draws random numbers changes the digits or their order.
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset == "synthetic":
        train, evaluated = [draw_digits(count, generator) for count in (60_000, 10_000)]
    else:
        train, evaluated = read_dataset(args.dataset, args.data_dir)
    if args.validate:
        train, evaluated = [part[: -args.validate] for part in train], [part[-args.validate :] for part in train]
    images, labels = (tensor[: args.limit] for tensor in train)
    train_loader = Loader(*on_device(images, labels, args.device), args.batch_size, generator)
    eval_loader = Loader(*on_device(*evaluated, args.device))
    split = "validation" if args.validate else "test"
    return Data(train_loader, eval_loader, class_names(args.dataset), args.dataset, split)


# ---- loaders and evaluation; needs nothing else of this file, for a program of one file ----


def on_device(images, labels, device):
    """Return uint8 images (N, H, W) as float (N, 1, H, W) in [0, 1], and labels (N,), both on the device."""
    return images.unsqueeze(1).to(device).float().div_(255), labels.to(device)


class Loader:
    """Batches of images (N, ...) and labels (N,), cut from tensors that stay on their device.

    A generator shuffles each pass anew. torch's DataLoader would wait for the device in each batch.
    """

    def __init__(self, images, labels, batch_size=200, generator=None):
        self.dataset, self.batch_size, self.generator = TensorDataset(images, labels), batch_size, generator

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        count = len(self.dataset)
        order = torch.randperm(count, generator=self.generator) if self.generator else torch.arange(count)
        for indices in order.to(self.dataset.tensors[0].device).split(self.batch_size):
            yield self.dataset[indices]


@torch.no_grad()
def evaluate(model, loader):
    """Return the loss, accuracy, confusion matrix, logits and labels of the model on all samples, on the CPU.

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
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    labels, classes = labels.long(), logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)  # of fewer bits, such as uint8, labels would overflow here
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return SimpleNamespace(
        loss=F.cross_entropy(logits, labels).item(),  # the mean per sample
        accuracy=confusion.trace().item() / len(labels),  # in [0, 1]
        confusion=confusion.cpu(),  # (C, C), int64: a row per true, a column per predicted class
        logits=logits.cpu(),  # (N, C)
        labels=labels.cpu(),  # (N,), int64
    )


def print_report(confusion, names):
    """Print precision, recall, F1 and count per class, each with a name, and the confusion matrix (C, C) below."""
    hits, predicted, counts = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    precision, recall = hits / predicted.clamp(min=1), hits / counts.clamp(min=1)  # a share of nothing is 0
    f1 = 2 * hits / (predicted + counts).clamp(min=1)  # the harmonic mean of the two
    width = max(12, *(len(name) + 2 for name in names))
    print(f"{'Class':<{width}}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for name, *shares, count in zip(names, precision, recall, f1, counts, strict=True):
        print(f"{name:<{width}}" + "".join(f"{share:>10.4f}" for share in shares) + f"{count:>10}")
    print("Confusion matrix, a row per true class, a column per predicted class:")
    # All columns are as wide as the first where a terminal of 80 has room for that.
    column = max(6, len(f"{confusion.max()}") + 2, min(width, (80 - width) // len(names)))
    for name, row in zip(["", *names], [names, *confusion.tolist()], strict=True):
        print(f"{name:<{width}}" + "".join(f"{str(cell)[: column - 1]:>{column}}" for cell in row))


# ---- report ----


def print_header(args, model, data):
    """Print the line that says what is trained, on what."""
    count = sum(parameter.numel() for parameter in model.parameters())
    training = f"{len(data.train_loader.dataset):,} training and " if args.epochs > 0 else ""
    samples = f"{training}{len(data.eval_loader.dataset):,} {data.split} samples"
    print(f"Device: {args.device}, Model: {type(model).__name__} ({count:,} parameters), Data: {data.name} ({samples})")


def scores(data, evaluation):
    """Return the words for the loss and accuracy that evaluate returns."""
    split = data.split.capitalize()
    return f"{split} loss: {evaluation.loss:.4f}, {split} accuracy: {evaluation.accuracy:.2%}"


def end_epoch(args, epoch, model, data, losses, start):
    """Evaluate the model, print the epoch's line, then write what --save and --log ask for; return the evaluation.

    losses: of the epoch's steps, tensors (). start: time.perf_counter() when it began. Raises UserError where a loss is
    not finite, before anything is written, and where a file cannot be written.
    """
    train_loss = torch.stack(losses).mean().item()  # .item() waits until the device has done all that it was given
    seconds = time.perf_counter() - start
    evaluation = evaluate(model, data.eval_loader)
    if not math.isfinite(train_loss + evaluation.loss):
        raise UserError(f"the loss is no longer finite after epoch {epoch}; try a smaller --lr")
    print(f"Epoch [{epoch}/{args.epochs}], {scores(data, evaluation)}, Time: {seconds:.2f} s")
    if args.save:
        # From the CPU, so that a machine without a GPU can load it; torch itself would not say that a disk is full.
        with replacing(args.save) as part, part.open("wb") as file:
            torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, file)
    if args.log:
        head = f"epoch,train_loss,{data.split}_loss,{data.split}_accuracy,seconds\n"
        rows = head if epoch == 1 else Path(args.log).read_text()
        row = f"{epoch},{train_loss:.6f},{evaluation.loss:.6f},{evaluation.accuracy:.6f},{seconds:.2f}\n"
        with replacing(args.log) as part:
            part.write_text(rows + row)
    return evaluation


def report(args, data, evaluation):
    """Print the closing report on the last evaluation, and draw the mistakes where --errors asks for them."""
    print("Training finished." if args.epochs > 0 else scores(data, evaluation))
    outputs = len(evaluation.confusion)
    names = [*data.classes[:outputs], *map(str, range(len(data.classes), outputs))]  # without a name, their number
    print_report(evaluation.confusion, names)
    if args.errors:
        draw_errors(args.errors, evaluation, data.eval_loader, names)


def draw_errors(file, evaluation, loader, names):
    """Draw as PNG up to 100 images, (H, W), (1, H, W) or (3, H, W), that the network gets wrong, the most sure first.

    Where a value is outside [0, 1], all are scaled into it. Raises UserError where the file cannot be written.
    """
    images = torch.cat([images.cpu() for images, _ in loader])
    low, high = images.min().clamp(max=0), images.max().clamp(min=1)
    confidence, predicted = evaluation.logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != evaluation.labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:100]
    font = ImageFont.load_default(size=13)
    width = 36 + max(84, *(int(font.getlength(f"true: {name}")) for name in names))
    sheet = Image.new("RGB", (10 * width, 140 * max(1, math.ceil(len(worst) / 10))), "white")
    for place, i in enumerate(worst):
        x, y = place % 10 * width + 18, place // 10 * 140 + 4
        image = (images[i] - low) / (high - low)
        sheet.paste(ImageOps.contain(to_pil_image(image), (84, 84), Image.Resampling.BOX), (x, y))
        text = f"true: {names[evaluation.labels[i]]}\nsaid: {names[predicted[i]]}\n{confidence[i]:.1%} sure"
        ImageDraw.Draw(sheet).multiline_text((x, y + 86), text, "black", font, spacing=2)
    with replacing(file) as part:
        sheet.save(part, "PNG")
    print(f"{file} shows {len(worst)} of {len(wrong)} mistakes.")


# ---- saved weights ----


@contextlib.contextmanager
def replacing(file):
    """Context that yields a path to write, which then replaces `file`. Raises UserError where it cannot be written."""
    part = Path(f"{file}.part")  # beside it, as only a move within a file system is one step
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {reason(error)}; name another place") from error
    finally:
        part.unlink(missing_ok=True)


def load_weights(model, file):
    """Give the model the state dict in `file`, without running code in it. Raises UserError where it does not fit."""
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # depending on what is odd about the file, torch raises about anything
        why = reason(error) if isinstance(error, (OSError, RuntimeError)) else "it holds no weights"
        advice = f"take a file that --save wrote for this {type(model).__name__}, with the same --hidden and --layers"
        raise UserError(f"cannot load {file} ({why}); {advice}") from error


# ---- pictures of your own ----


def grey_levels(image):
    """Return a Pillow image as grey levels (H, W), float in [0, 255]; what is transparent becomes paper."""
    if image.has_transparency_data:
        grey, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).float()  # each (H, W)
        paper = 255 * (grey[alpha > 127].median() < 128)  # light below dark ink, dark below light ink
        return paper + (grey - paper) * alpha / 255
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel
        grey = pil_to_tensor(image.convert("F"))[0]
        return grey * 255 / grey.max()
    return pil_to_tensor(image.convert("L"))[0].float()


def find_ink(grey):
    """Return how much ink is on the paper, (H, W) in [0, 1], from grey levels (H, W). Raises ValueError for none."""
    if grey.median() - grey.min() < grey.max() - grey.median():  # more paper than ink: the paper is dark
        grey = 255 - grey
    # The paper is as light as the lightest pixel in each cell of a grid. A coarser one would not follow a shadow or the
    # edge of a table; in a finer one a felt pen would fill a cell.
    paper = F.adaptive_max_pool2d(grey[None], 10)  # (1, 10, 10)
    paper = F.avg_pool2d(paper, 3, 1, 1, count_include_pad=False)
    ink = F.interpolate(paper[None], size=grey.shape, mode="bilinear")[0, 0] - grey
    ink = (ink - ink.median()).clamp(min=0)  # most of the picture is paper, which is a little darker where it has grain
    if ink.max() < 30:  # the faintest of 538 pictures that people made has 99
        raise ValueError("there is nothing on it")
    return ink / ink.max()


def heaviest_part(ink):
    """Return ink (H, W) in [0, 1], H and W multiples of 4, without what is not connected to most of it.

    A part has to weigh 0.3 of the heaviest, as the second stroke of a 4 does. What touches the picture's edge counts a
    hundredth, since a table can weigh many times as much as a digit.
    """
    drawn = F.max_pool2d(ink[None], 4)[0] > 0.3  # in cells of 4x4 pixels, which bridge small gaps; grain reaches less
    part = torch.arange(1, drawn.numel() + 1).view(drawn.shape) * drawn  # a number for each
    while not part.equal(spread := F.max_pool2d(part[None], 3, 1, 1)[0] * drawn):
        part = spread  # until all of a part has the highest of its numbers
    weight = torch.bincount(part.flatten(), (F.avg_pool2d(ink[None], 4)[0] * drawn).flatten())
    weight[torch.cat([part[[0, -1]].flatten(), part[:, [0, -1]].flatten()])] /= 100
    kept = (weight > 0.3 * weight.max())[part].float()
    kept = F.max_pool2d(kept[None, None], 3, 1, 1)  # a cell more, for the outline
    return ink * F.interpolate(kept, scale_factor=4)[0, 0]


def mnist_form(grey):
    """Bring the digit in a picture into the form of MNIST's: grey levels (H, W) in [0, 255] to (1, 28, 28) in [0, 1].

    The digit may be dark on light or the reverse, of any size, anywhere. As in LeCun, Bottou, Bengio and Haffner,
    "Gradient-based learning applied to document recognition" (1998), it is scaled, there to fit 20x20 pixels, and moved
    until its centre of mass is at pixel (14, 14), where MNIST's files have it. Raises ValueError where there is none.
    """
    # With fewer pixels thin strokes are lost, with more a stroke falls into parts.
    sides = [4 * math.ceil(side * 64 / max(grey.shape)) for side in grey.shape]  # 256, and less
    grey = F.interpolate(grey[None, None], size=sides, mode="bilinear", antialias=True)[0, 0]
    ink = heaviest_part(find_ink(grey))
    rows, columns = (ink > 0.25).nonzero(as_tuple=True)  # the digit with half of its soft edge, and without grain
    # To 19 pixels, as most pens are finer than MNIST's: with 20 the middle of a stroke would lie further out.
    side = round(28 / 19 * (1 + max(rows.max() - rows.min(), columns.max() - columns.min())).item())
    mass = ink / ink.sum()
    top = round((mass.sum(dim=1) @ torch.arange(0.5, sides[0])).item() - side * 14.5 / 28)
    left = round((mass.sum(dim=0) @ torch.arange(0.5, sides[1])).item() - side * 14.5 / 28)
    square = F.pad(ink, (-left, left + side - sides[1], -top, top + side - sides[0]))
    digit = F.interpolate(square[None, None], size=(28, 28), mode="bilinear", antialias=True)[0]
    digit = digit / digit.max()
    # Nearer to the mean of MNIST's training images, 0.1307: a pencil becomes stronger, a felt pen finer.
    return digit ** (math.log(0.1307) / math.log(digit.mean()))


def read_picture(file):
    """Return the digit in a picture file as mnist_form gives it. Where there is none, it raises about anything."""
    image = Image.open(file)
    image.draft("L", (512, 512))  # from a larger JPEG, read no more than that takes
    return mnist_form(grey_levels(ImageOps.exif_transpose(image)))


def predict_pictures(model, args):
    """Print for each picture of --predict the class that the model gives it, and how sure it is.

    Names are numbers where --dataset has more or fewer. Raises UserError at the end for pictures without a digit.
    """
    names, failures = class_names(args.dataset), []
    for file in args.predict:
        try:
            image = read_picture(file)
        except Exception as error:  # depending on what is odd about a picture, Pillow raises about anything
            failures.append(f"cannot read a digit from {file}: {reason(error)}")
            continue
        logits = evaluate(model, [(image.unsqueeze(0), torch.zeros(1))]).logits[0]  # nobody knows the label
        confidence, label = logits.softmax(dim=0).max(dim=0)
        name = names[label] if len(logits) == len(names) else label.item()
        print(f"{file}: {name} ({confidence:.1%})")
    if failures:
        raise UserError("; ".join(failures))
