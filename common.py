"""Code shared by cnn_mnist.py and rnn_mnist.py, which contain the networks and the training loop.

Read "loaders and evaluation" and "data" to understand a run. Look up "report" and "weights and
files": they print and write the results. You can skip the rest: "pictures of your own" is for
--predict, "options" for argparse, "setup and errors" for repeatable runs and clear messages.
"""

import argparse
import contextlib
import ctypes
import math
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize, resized_crop, to_pil_image

# ---- loaders and evaluation ----
# A single file can copy this section. It needs four of the imports: math, SimpleNamespace, torch
# and torch.nn.functional as F.


def as_floats(images, labels, device):
    """Convert uint8 images (N, H, W) to float (N, 1, H, W) in [0, 1]; move all to the device."""
    images = images.to(device).unsqueeze(1)  # (N, 1, H, W)
    return images.float().div_(255), labels.to(device)


def random_affine(images, degrees=10, scale=0.1, shift=2, generator=None):
    """Apply a different random rotation, scaling and shift to each image, on the images' device.

    images: (N, C, H, W) float; returns the same shape, with 0 outside the original image.
    degrees, scale (a fraction) and shift (in pixels along each axis) are the maximum changes.
    """
    count, _, height, width = images.shape
    angle, zoom, dx, dy = torch.rand(4, count, device=images.device, generator=generator) * 2 - 1
    angle *= math.radians(degrees)
    zoom = 1 + zoom * scale
    dx, dy = dx * shift * 2 / width, dy * shift * 2 / height  # an image is 2 units wide and high
    # affine_grid needs, for each output pixel, the input position that it is copied from. One step
    # in the output is a step of `along` on the same axis of the input, and of `across` on the other
    # axis, where a unit has another length if the image is not square.
    along, across = angle.cos() / zoom, angle.sin() / zoom
    x_from_y, y_from_x = -across * (height / width), across * (width / height)
    theta = torch.stack([along, x_from_y, dx, y_from_x, along, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, H, W)


class Loader:
    """Iterate over batches of images (N, ...) and labels (N,), which stay on their device.

    With a generator, each epoch has a new random order. torch's DataLoader is slower, because it
    collects a batch sample by sample.
    """

    def __init__(self, images, labels, batch_size=200, generator=None):
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count = len(self.labels)
        order = torch.arange(count)
        if self.generator:
            order = torch.randperm(count, generator=self.generator)
        for indices in order.to(self.labels.device).split(self.batch_size):
            yield self.images[indices], self.labels[indices]


@torch.no_grad()
def evaluate(model, loader):
    """Evaluate the model on all samples; return loss, accuracy, confusion matrix, logits, labels.

    model: maps images to logits (N, C). loader: batches of images and labels (N,), on any device.
    The results are on the CPU. The model's mode, training or evaluation, is restored.
    """
    training = model.training
    device = next(model.parameters()).device
    all_logits, all_labels = [], []
    model.eval()
    for images, labels in loader:
        all_logits.append(model(images.to(device)))
        all_labels.append(labels.to(device))
    model.train(training)
    logits = torch.cat(all_logits)
    labels = torch.cat(all_labels).long()  # uint8 would overflow in the next lines
    # Give each pair of a true and a predicted class a number, and count the pairs.
    size = logits.shape[1]
    pairs = labels * size + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=size**2).view(size, size)
    return SimpleNamespace(
        loss=F.cross_entropy(logits, labels).item(),  # mean over the samples
        accuracy=confusion.trace().item() / len(labels),  # in [0, 1]
        confusion=confusion.cpu(),  # (C, C), int64: rows are true classes, columns are predictions
        logits=logits.cpu(),  # (N, C)
        labels=labels.cpu(),  # (N,), int64
    )


def print_tables(confusion, names):
    """Print precision, recall, F1 and count of each class, then the confusion matrix (C, C)."""
    hits, predicted, counts = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    # clamp avoids 0 / 0: a class without predictions or without samples gets 0.
    precision, recall = hits / predicted.clamp(min=1), hits / counts.clamp(min=1)
    f1 = 2 * hits / (predicted + counts).clamp(min=1)  # harmonic mean of precision and recall
    width = max(12, *(len(name) + 2 for name in names))
    print(f"{'Class':<{width}}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for name, p, r, f, count in zip(names, precision, recall, f1, counts, strict=True):
        print(f"{name:<{width}}{p:>10.4f}{r:>10.4f}{f:>10.4f}{count:>10}")
    print("Confusion matrix (rows: true classes, columns: predicted classes):")
    # Show whole names if the matrix still fits in 80 characters; otherwise, cut them.
    column = max(6, len(f"{confusion.max()}") + 2, min(width, (80 - width) // len(names)))
    print(" " * width + "".join(f"{name[: column - 1]:>{column}}" for name in names))
    for name, row in zip(names, confusion.tolist(), strict=True):
        print(f"{name:<{width}}" + "".join(f"{count:>{column}}" for count in row))


# ---- data ----


DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "synthetic": datasets.MNIST,  # only its class names are used
}


def draw_digits(count, generator):
    """Draw synthetic digits: uint8 images (N, 28, 28) and labels (N,)."""
    font = ImageFont.load_default(size=24)
    digits = torch.zeros(10, 1, 28, 28)
    for digit in range(10):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), fill=255, font=font, anchor="mm")
        digits[digit] = pil_to_tensor(picture)
    labels = torch.randint(10, (count,), generator=generator)
    # A strong distortion makes these digits about as hard to learn as MNIST. 500 images at a time
    # fit in the CPU's cache, which is faster.
    images = [random_affine(digits[some], 30, 0.4, 4, generator) for some in labels.split(500)]
    return torch.cat(images).round().to(torch.uint8).squeeze(1), labels


def read_dataset(name, data_dir):
    """Read a torchvision dataset from `data_dir`; download it if it is missing.

    Returns the training and the test split, each as uint8 images (N, 28, 28) and int64 labels
    (N,). Raises UserError if the dataset can be neither read nor downloaded.
    """
    dataset = DATASETS[name]
    try:
        splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision has no exception type for failed downloads and reads
        folder = Path(data_dir, dataset.__name__, "raw")
        raise UserError(
            f"cannot read or download {folder}: {reason(error)}; check --data-dir; after an "
            "interrupted download, move that folder away to download again; "
            "without internet access, use --dataset synthetic"
        ) from error
    return [(split.data, split.targets) for split in splits]


@dataclass
class Data:
    """The data to train and evaluate on, and the names that are printed for it.

    train_loader: a Loader or a torch DataLoader; each batch has inputs (N, ...) for the network and
    labels (N,), int64. eval_loader: the same, without shuffling. classes: the names of the classes,
    in the order of the network's outputs. name: the name of the dataset. split: "test" or
    "validation", depending on what eval_loader contains. Raises UserError if there are no training
    samples.
    """

    train_loader: object
    eval_loader: object
    classes: list
    name: str = "custom data"
    split: str = "test"

    def __post_init__(self):
        if len(self.train_loader) == 0:
            raise UserError("no training samples; use a smaller --validate, or more data")


def load_data(args):
    """Return the Data that the options select, on the device. Raises UserError if that fails."""
    # A separate generator: creating a network also draws random numbers, which must not change the
    # synthetic digits or the order of the training images.
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset == "synthetic":
        train = draw_digits(60_000, generator)
        held_out = draw_digits(10_000, generator)
    else:
        train, held_out = read_dataset(args.dataset, args.data_dir)
    split = "test"
    if args.validate:
        split = "validation"
        held_out = [tensor[-args.validate :] for tensor in train]
        train = [tensor[: -args.validate] for tensor in train]
    train = [tensor[: args.limit] for tensor in train]
    train_loader = Loader(*as_floats(*train, args.device), args.batch_size, generator)
    eval_loader = Loader(*as_floats(*held_out, args.device))
    # torchvision's names for MNIST are "0 - zero" and so on.
    classes = [name.partition(" - ")[0] for name in DATASETS[args.dataset].classes]
    return Data(train_loader, eval_loader, classes, args.dataset, split)


# ---- report ----


def count_samples(loader):
    """Return the number of samples in a Loader or a torch DataLoader."""
    return len(loader.labels if isinstance(loader, Loader) else loader.dataset)


def print_header(args, model, data):
    """Print one line with the device, the model and the dataset."""
    count = sum(parameter.numel() for parameter in model.parameters())
    network = f"{type(model).__name__} ({count:,} parameters)"
    training = f"{count_samples(data.train_loader):,} training and " if args.epochs > 0 else ""
    samples = f"{training}{count_samples(data.eval_loader):,} {data.split} samples"
    print(f"Device: {args.device}, Model: {network}, Data: {data.name} ({samples})")


def check_finite(train_loss, eval_loss):
    """Raise UserError if a loss is infinite or NaN: then the weights are of no use."""
    if not math.isfinite(train_loss + eval_loss):
        raise UserError(
            "the loss is not finite; try a smaller --lr, "
            "or look for values in the data that are not finite"
        )


def format_scores(data, evaluation):
    """Format the loss and accuracy of an evaluation."""
    split = data.split.capitalize()
    return f"{split} loss: {evaluation.loss:.4f}, {split} accuracy: {evaluation.accuracy:.2%}"


def write_log(file, epoch, data, train_loss, evaluation, seconds):
    """Write the results of an epoch as a row of a CSV file; epoch 1 starts a new file."""
    with naming(file), open(file, "w" if epoch == 1 else "a") as log:
        if epoch == 1:
            log.write(f"epoch,train_loss,{data.split}_loss,{data.split}_accuracy,seconds\n")
        log.write(f"{epoch},{train_loss:.6f},{evaluation.loss:.6f},")
        log.write(f"{evaluation.accuracy:.6f},{seconds:.2f}\n")


def report(args, data, evaluation):
    """Print the final report and, with --errors, draw the misclassified images."""
    print("Training finished." if args.epochs > 0 else format_scores(data, evaluation))
    outputs = len(evaluation.confusion)
    names = [*data.classes, *range(len(data.classes), outputs)]  # numbers, if there is no name
    names = [str(name) for name in names[:outputs]]
    print_tables(evaluation.confusion, names)
    if args.errors:
        draw_errors(args.errors, evaluation, data.eval_loader, names)


def draw_errors(file, evaluation, loader, names):
    """Draw up to 100 misclassified images, most confident first, as a PNG file.

    The images are (H, W), (1, H, W) or (3, H, W). If an image has values outside [0, 1], it is
    rescaled to [0, 1]. Raises UserError if the file cannot be written.
    """
    confidence, predicted = evaluation.logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != evaluation.labels).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:100].tolist()
    # Pillow's built-in font has no letters outside ASCII.
    names = [name[:12] if name.isascii() else str(i) for i, name in enumerate(names)]
    font = ImageFont.load_default(size=13)
    # A cell has 120x140 pixels: an image of 84x84, three lines of text, and margins.
    sheet = Image.new("RGB", (1200, 140 * max(1, math.ceil(len(worst) / 10))), "white")
    samples = (sample for images, labels in loader for sample in zip(images, labels, strict=True))
    for i, (image, label) in enumerate(samples):
        if label != evaluation.labels[i]:
            raise UserError("cannot draw errors: eval_loader must not shuffle the images")
        if i not in worst:
            continue
        row, column = divmod(worst.index(i), 10)
        x, y = column * 120 + 18, row * 140 + 4
        low, high = min(0, image.min()), max(1, image.max())
        picture = to_pil_image((image - low) / (high - low))
        sheet.paste(ImageOps.contain(picture, (84, 84), Image.Resampling.BOX), (x, y))
        text = f"true: {names[label]}\npred: {names[predicted[i]]}\n{confidence[i]:.1%} sure"
        ImageDraw.Draw(sheet).text((x, y + 86), text, "black", font, spacing=2)
    with replacing(file) as temporary:
        sheet.save(temporary, "PNG")
    print(f"{file} shows {len(worst)} of {len(wrong)} mistakes.")


# ---- weights and files ----


@contextlib.contextmanager
def naming(file):
    """Context manager: turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {file}: {reason(error)}; choose another path") from error


def check_writable(file):
    """Raise UserError if `file` cannot be written, so that a run fails before the training."""
    folder = os.path.dirname(os.path.realpath(file))  # for a link: the folder of its target
    with naming(file):
        if os.path.isdir(file):
            raise OSError("it is a folder")
        if not os.access(folder, os.W_OK):
            raise OSError("its folder does not exist or is write-protected")


@contextlib.contextmanager
def replacing(file):
    """Context manager: yields a temporary path to write to.

    If nothing fails, the file that was written there replaces `file`.
    """
    target = os.path.realpath(file)
    # The temporary file is in the same folder, so that replace() is atomic: the old file stays
    # until the new one is complete.
    temporary = Path(f"{target}.part")
    with naming(file):
        try:
            yield temporary
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def save_weights(model, file):
    """Save the model's state dict; raise UserError if the file cannot be written."""
    # As CPU tensors, a plain torch.load reads them on a machine without a GPU, too.
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    # Given a path, torch.save would not report a full disk; given an open file, it does.
    with replacing(file) as temporary, temporary.open("wb") as opened:
        torch.save(weights, opened)


def load_weights(model, file):
    """Load a state dict into the model; never run code that the file may contain.

    Raises UserError if the file cannot be read, or has the weights of another network.
    """
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # for an invalid file, torch may raise almost any exception
        raise UserError(
            f"cannot load {file} ({reason(error)}); use a file that --save wrote "
            f"for the network {type(model).__name__}, with layers of the same size"
        ) from error


# ---- pictures of your own ----


def grey_levels(image):
    """Convert a Pillow image to grey levels (H, W), float in [0, 255]; transparent is white."""
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(paper, image).convert("L"))[0].float()


def find_ink(grey):
    """Return the amount of ink per pixel, (H, W) in [0, 1], from grey levels (H, W).

    Raises ValueError if there is hardly any contrast.
    """
    # Most pixels are paper, so the median is the level of the paper. If it is nearer to the darkest
    # pixel than to the lightest one, the ink is light: invert.
    if grey.median() - grey.min() < grey.max() - grey.median():
        grey = 255 - grey
    # Estimate the paper by the lightest pixel in each cell of a grid. With larger cells, a shadow
    # would count as ink; with smaller ones, a thick stroke could fill a cell and count as paper.
    paper = F.adaptive_max_pool2d(grey[None], 10)  # (1, 10, 10)
    paper = F.avg_pool2d(paper, 3, stride=1, padding=1, count_include_pad=False)  # smooth
    ink = F.interpolate(paper[None], grey.shape, mode="bilinear")[0, 0] - grey
    # Most of the paper is slightly darker than the estimate. Subtract the median: paper becomes 0.
    ink = (ink - ink.median()).clamp(min=0)
    # 30 of 255 is safe: for 538 pictures of handwritten digits, ink.max() was never below 99.
    if ink.max() < 30:
        raise ValueError("no strokes found")
    return ink / ink.max()


def main_components(ink):
    """Keep the connected components with the most ink; set all other ink to 0.

    ink: (H, W) in [0, 1], H and W multiples of 4; returns the same shape. A component is kept if
    it has more than 0.3 times as much ink as the component with the most ink, so the second stroke
    of a 4 is kept. If a component touches the border, its ink counts only 1/100 in this comparison,
    because in a photo, the dark edge of a desk can have far more ink than the digit.
    """
    # Mark the cells of 4x4 pixels that contain ink. This closes small gaps, and ignores noise.
    drawn = F.max_pool2d(ink[None], 4)[0] > 0.3  # (H / 4, W / 4)
    # Each cell starts with its own number, and then repeatedly takes the highest number of its
    # neighbours, until all cells of a component have the same one. 0 is the background.
    component = torch.arange(1, drawn.numel() + 1).view(drawn.shape) * drawn
    while True:
        spread = F.max_pool2d(component[None], 3, stride=1, padding=1)[0] * drawn
        if spread.equal(component):
            break
        component = spread
    cell_ink = F.avg_pool2d(ink[None], 4)[0] * drawn
    total = torch.bincount(component.flatten(), cell_ink.flatten())  # the ink of each component
    edges = [component[0], component[-1], component[:, 0], component[:, -1]]
    total[torch.cat(edges).unique()] /= 100
    is_kept = total > 0.3 * total.max()  # for each component
    kept = is_kept[component].float()  # for each cell: 1 if its component is kept, otherwise 0
    kept = F.max_pool2d(kept[None, None], 3, stride=1, padding=1)  # 1 in the cells around it, too
    return ink * F.interpolate(kept, scale_factor=4)[0, 0]


def mnist_form(grey):
    """Convert a picture of a digit, grey levels (H, W) in [0, 255], to MNIST's format (1, 28, 28).

    The digit may be dark on light or the reverse, of any size, anywhere. As in MNIST, it is scaled,
    and its centre of mass is moved to pixel (14, 14); see LeCun, Bottou, Bengio and Haffner,
    "Gradient-based learning applied to document recognition" (1998). Raises ValueError if there is
    hardly any contrast.
    """
    # The longer side becomes 256 pixels. With fewer, thin strokes would vanish; with more, strokes
    # would fall apart into several components.
    height, width = (4 * math.ceil(side * 64 / max(grey.shape)) for side in grey.shape)
    ink = main_components(find_ink(resize(grey[None], [height, width])[0]))
    # The square to cut out becomes 28 pixels wide. In MNIST, the longer side of a digit has 20 of
    # them, measured at the outer edges of thick strokes. Most people's strokes are thinner; with 19
    # pixels, the middle of a stroke is where MNIST has it.
    rows, columns = (ink > 0.25).nonzero(as_tuple=True)  # without the blurred edge of the strokes
    longer = 1 + max(rows.max() - rows.min(), columns.max() - columns.min()).item()
    side = round(longer * 28 / 19)
    # The centre of mass comes to the middle of pixel 14, which is at 14.5 (of pixel i, at i + 0.5).
    mass = ink / ink.sum()
    row = (mass.sum(dim=1) @ torch.arange(0.5, height)).item()
    column = (mass.sum(dim=0) @ torch.arange(0.5, width)).item()
    middle = side * 14.5 / 28
    top, left = round(row - middle), round(column - middle)
    digit = resized_crop(ink[None], top, left, side, side, [28, 28])  # 0 outside the picture
    digit = digit / digit.max()
    # Bring the mean closer to that of MNIST's training images, 0.1307: this makes the strokes of a
    # pencil bolder, and those of a felt pen thinner.
    gamma = math.log(0.1307) / math.log(digit.mean())
    return digit**gamma


def read_picture(file):
    """Read a picture file; return the image of its digit in MNIST's format (1, 28, 28)."""
    image = ImageOps.exif_transpose(Image.open(file))  # upright, as its camera says
    return mnist_form(grey_levels(image))


@torch.no_grad()
def predict_pictures(model, args):
    """Print the predicted digit in each --predict picture, and its probability.

    Raises UserError at the end if a picture cannot be read.
    """
    model.eval()
    failures = []
    for file in args.predict:
        try:
            image = read_picture(file)
        except Exception as error:  # for an invalid picture, Pillow may raise almost any exception
            failures.append(f"cannot read a digit from {file}: {reason(error)}")
            continue
        logits = model(image[None].to(args.device))[0]
        confidence, digit = logits.softmax(dim=0).max(dim=0)
        print(f"{file}: {digit} ({confidence:.1%})")
    if failures:
        reasons = "; ".join(failures)
        raise UserError(f"{reasons}; use JPEG or PNG files of one digit on plain paper")


# ---- options ----


def positive_int(text):
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def find_device(name):
    """argparse type: convert a name to a torch.device; `auto` prefers a GPU to the CPU."""
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        # This raises an error if the driver is missing or the GPU is too old.
        (torch.ones(1, device=name) + 1).item()
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # CUDA adds hints for programmers
        message = f"{name} cannot be used: {reason(first_line)}; try --device cpu"
        raise argparse.ArgumentTypeError(message) from error
    return torch.device(name)


def make_parser(description):
    """Return an argparse parser with the options that both scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    add = parser.add_argument_group("training").add_argument
    epochs_help = "number of epochs; 0 only evaluates (default: %(default)s)"
    add("--epochs", type=int, default=10, metavar="N", help=epochs_help)
    batch_help = "images per step (default: %(default)s)"
    add("--batch-size", type=positive_int, default=100, metavar="N", help=batch_help)
    add("--lr", type=float, help="learning rate (default: 0.001, or 0.01 with --one-cycle)")
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it")
    add("--augment", action="store_true", help="rotate, scale and shift training images at random")
    seed_help = "same seed, machine and number of threads: same weights (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=seed_help)
    device_help = "cpu, cuda, cuda:1, mps, ...; auto: GPU, otherwise CPU (default: %(default)s)"
    add("--device", type=find_device, default="auto", metavar="NAME", help=device_help)

    add = parser.add_argument_group("data").add_argument
    dataset_help = "synthetic needs no download (default: %(default)s)"
    add("--dataset", choices=DATASETS, default="mnist", help=dataset_help)
    folder_help = "dataset folder (default: %(default)s)"
    add("--data-dir", default="data", metavar="DIR", help=folder_help)
    add("--limit", type=positive_int, metavar="N", help="train on the first N training images")
    validate_help = "hold out the last N training images; evaluate on them, not on test images"
    add("--validate", type=positive_int, metavar="N", help=validate_help)

    add = parser.add_argument_group("results").add_argument
    add("--log", metavar="FILE", help="write losses, accuracy and time of each epoch to a CSV file")
    add("--save", metavar="FILE", help="save the weights after each epoch, as a state dict")
    add("--load", metavar="FILE", help="start from weights saved with --save")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: classify digits in pictures")
    add("--errors", metavar="FILE.png", help="at the end, draw misclassified images")
    return parser


def parse_args(parser, argv):
    """Parse `argv`, a list or a string (None: the command line), and check the options."""
    if argv is None:
        # In a notebook, sys.argv belongs to the kernel.
        argv = [] if sys.argv[0].endswith("kernel_launcher.py") else sys.argv[1:]
    elif isinstance(argv, str):
        argv = argv.split()
    args = parser.parse_args([str(word) for word in argv])
    if args.lr is None:
        args.lr = 0.01 if args.one_cycle else 0.001
    if args.predict and not args.load:
        parser.error("argument --predict: needs trained weights; add --load FILE")
    if args.predict and args.dataset not in ("mnist", "synthetic"):
        parser.error(f"argument --predict: reads only digits, and {args.dataset} has none")
    if args.errors and not args.errors.lower().endswith(".png"):
        parser.error("argument --errors: the file name must end in .png")
    for file in filter(None, (args.save, args.log, args.errors)):
        check_writable(file)
    return args


# ---- setup and errors ----


def set_up(seed):
    """Set the random seed, and change GPU, memory and printing settings of the whole process."""
    torch.manual_seed(seed)
    # With these settings, a GPU computes the same weights for the same seed, see
    # https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    torch.backends.cudnn.deterministic = True
    torch.backends.mkldnn.deterministic = True  # for Intel GPUs, which use oneDNN
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    # On Linux, glibc returns freed memory to the system, and getting it back for the next training
    # step takes time. These two settings make the process keep it, see mallopt(3).
    with contextlib.suppress(OSError, AttributeError):  # on a system without glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        # Show progress immediately, also in a pipe; print "?" for a letter that cannot be encoded.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do."""

    def _render_traceback_(self):  # IPython shows this instead of a traceback
        return [f"error: {self}"]


def reason(error):
    """Return the first sentence of an exception's message, in at most 200 characters."""
    message = str(error) or type(error).__name__
    return textwrap.shorten(message, 200, placeholder=" ...").partition(". ")[0]


def run(main):
    """Run main() as a program and return its result.

    A UserError is printed as one line, with exit status 1; Ctrl-C gives status 130.
    """
    if not hasattr(sys.stdout, "reconfigure"):
        # This is the stdout of a notebook or an IDE, which displays errors itself.
        return main()
    try:
        return main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # sys.exit would flush stdout, and fail again
