"""Code shared by cnn_mnist.py and rnn_mnist.py, which contain the networks and the training loop.

To understand a run, read as_floats, Loader, evaluate, Data and load_data. When you need them, look
up the other parts of the sections "loaders and evaluation", "data", "report" and "weights and
files" (for --augment: random_affine).

You can skip the last three sections: "pictures of your own" (--predict), "options" (argparse), and
"setup and errors" (repeatable runs; the exception UserError; reason(), which shortens messages).
"""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize, resized_crop, to_pil_image

# ---- loaders and evaluation ----
# If you have to hand in a single file, copy this section into it: README.md shows such a file.
# The section needs five of the imports: math, dataclass, SimpleNamespace, torch, and
# torch.nn.functional as F.


def as_floats(images, labels, device):
    """Convert uint8 images (N, H, W) to float (N, 1, H, W) in [0, 1]; move all to the device."""
    images = images.to(device).unsqueeze(1)  # (N, 1, H, W)
    return images.float().div_(255), labels.to(device)


@dataclass
class Loader:
    """Iterate over batches of images (N, ...) and labels (N,), on the device where they are.

    With a generator, each epoch has a new random order. torch's DataLoader is slower, because it
    collects a batch sample by sample.
    """

    images: torch.Tensor
    labels: torch.Tensor
    batch_size: int = 100
    generator: torch.Generator | None = None

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count = len(self.labels)
        order = torch.arange(count)
        if self.generator:
            # The generator is on the CPU, so the order has to be drawn there, even if a notebook
            # has called torch.set_default_device.
            order = torch.randperm(count, generator=self.generator, device="cpu")
        for indices in order.to(self.labels.device).split(self.batch_size):
            yield self.images[indices], self.labels[indices]


@torch.no_grad()
def evaluate(model, loader):
    """Evaluate the model on all samples; return loss, accuracy, confusion matrix, logits, labels.

    model: maps images to logits (N, C), for C classes. loader: batches of images and labels (N,);
    they may be on any device. The results are on the CPU. The model's mode, training or evaluation,
    is restored.
    """
    training = model.training
    device = next(model.parameters()).device
    all_logits, all_labels = [], []
    model.eval()
    for images, labels in loader:
        all_logits.append(model(images.to(device)))
        all_labels.append(labels)
    model.train(training)
    logits = torch.cat(all_logits).cpu()
    labels = torch.cat(all_labels).cpu().long()  # int64, even if the loader has uint8
    # Number each pair of a true and a predicted class (with 10 classes, true 3 and predicted 5 are
    # number 35), and count how often each number occurs.
    size = logits.shape[1]
    pairs = labels * size + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=size**2).view(size, size)
    return SimpleNamespace(
        loss=F.cross_entropy(logits, labels).item(),  # mean over the samples
        accuracy=confusion.trace().item() / len(labels),  # in [0, 1]
        confusion=confusion,  # (C, C), int64: rows are true classes, columns are predictions
        logits=logits,  # (N, C)
        labels=labels,  # (N,), int64
    )


def print_tables(confusion, names):
    """Print precision, recall, F1 and count of each class, then the confusion matrix (C, C)."""
    hits, predicted, counts = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    # clamp avoids 0 / 0: a class without predictions or without samples gets 0.
    precision, recall = hits / predicted.clamp(min=1), hits / counts.clamp(min=1)
    # F1 is 2 * precision * recall / (precision + recall), which is the same as this:
    f1 = 2 * hits / (predicted + counts).clamp(min=1)
    width = max(12, 2 + max(map(len, names)))
    print(f"{'Class':<{width}}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for name, p, r, f, count in zip(names, precision, recall, f1, counts, strict=True):
        print(f"{name:<{width}}{p:>10.4f}{r:>10.4f}{f:>10.4f}{count:>10}")
    print("Confusion matrix (rows: true classes, columns: predicted classes):")
    # Show whole names if the matrix still fits in 80 characters; otherwise, cut them. A column has
    # at least 6 characters: a space, and 5 for the digits of a count.
    room = (80 - width) // len(names)
    column = max(6, min(width, room)) - 1  # without the space
    print(" " * width + "".join(f" {name[:column]:>{column}}" for name in names))
    for name, row in zip(names, confusion.tolist(), strict=True):
        print(f"{name:<{width}}" + "".join(f" {count:>{column}}" for count in row))


def random_affine(images, degrees=10, scale=0.1, shift=2, generator=None):
    """Apply a different random rotation, scaling and shift to each image, on the images' device.

    images: (N, C, H, W) float, C channels; returns the same shape, with 0 outside the original
    image. degrees, scale (a fraction) and shift (in pixels of the input, along each axis) are the
    largest changes; the changes are positive or negative. generator: a torch.Generator on the same
    device.
    """
    count, _, height, width = images.shape
    # four vectors (N,) of random numbers in [-1, 1)
    angle, zoom, dx, dy = torch.rand(4, count, device=images.device, generator=generator) * 2 - 1
    angle *= math.radians(degrees)
    zoom = 1 + zoom * scale
    # affine_grid needs the inverse map: for each output pixel, the input position that it is copied
    # from. That is a rotation matrix divided by zoom, then the shift. (The signs of angle and shift
    # do not matter, because they are random.) affine_grid measures x in units of width / 2, and y
    # in units of height / 2. So whatever goes from y into x is multiplied by height / width, and
    # from x into y by width / height (for square images, both are 1).
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    x_row = [cos, -sin * (height / width), dx * shift * 2 / width]
    y_row = [sin * (width / height), cos, dy * shift * 2 / height]
    theta = torch.stack(x_row + y_row, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)  # (N, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, H, W)


# ---- data ----


DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "synthetic": datasets.MNIST,  # see draw_digits; only the names of the classes are MNIST's
}


def draw_digits(count, generator):
    """Draw synthetic digits: uint8 images (N, 28, 28) and labels (N,)."""
    digits = torch.zeros(10, 1, 28, 28)
    for digit in range(10):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), fill=255, font_size=24, anchor="mm")
        digits[digit] = pil_to_tensor(picture)
    labels = torch.randint(10, (count,), generator=generator)
    # A strong distortion (30 degrees, 40%, 4 pixels) makes these digits about as hard to learn as
    # MNIST. 500 images at a time fit in the CPU's cache, which is faster.
    # part: 500 labels; digits[part]: the picture of each, (500, 1, 28, 28).
    parts = [random_affine(digits[part], 30, 0.4, 4, generator) for part in labels.split(500)]
    return torch.cat(parts).round().byte().squeeze(1), labels


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
    "validation", depending on what eval_loader contains. Raises UserError if a loader is empty.
    """

    train_loader: object
    eval_loader: object
    classes: list
    name: str = "custom data"
    split: str = "test"

    def __post_init__(self):
        self.classes = [str(name) for name in self.classes]
        for loader in (self.train_loader, self.eval_loader):
            if len(loader) == 0:
                raise UserError("no samples in a loader; use a smaller --validate, or more data")


def load_data(args):
    """Return the Data that the options select, on the device. Raises UserError if that fails."""
    if args.dataset == "synthetic":
        generator = torch.Generator().manual_seed(0)  # the same digits for each value of --seed
        with torch.device("cpu"):  # even if torch.set_default_device was called
            train, held_out = draw_digits(60_000, generator), draw_digits(10_000, generator)
    else:
        train, held_out = read_dataset(args.dataset, args.data_dir)
    # train and held_out are pairs of tensors: images (N, 28, 28), and labels (N,). held_out is the
    # test set; with --validate, it becomes the last training images.
    split = "test"
    if args.validate:
        split = "validation"
        held_out = [tensor[-args.validate :] for tensor in train]
        train = [tensor[: -args.validate] for tensor in train]
    train = [tensor[: args.limit] for tensor in train]  # without --limit, [:None] is everything
    # The order of the images has its own generator. Otherwise, it would differ between networks,
    # because creating a network draws random numbers, too.
    generator = torch.Generator().manual_seed(args.seed)
    # The stars pass the two tensors of a pair as two arguments.
    train_loader = Loader(*as_floats(*train, args.device), args.batch_size, generator)
    eval_loader = Loader(*as_floats(*held_out, args.device), args.batch_size)
    # torchvision's names for MNIST are "0 - zero" and so on.
    classes = [name.partition(" - ")[0] for name in DATASETS[args.dataset].classes]
    return Data(train_loader, eval_loader, classes, args.dataset, split)


# ---- report ----


def describe(loader, split):
    """Return how much a Loader or a DataLoader yields, such as "1,000 test samples"."""
    if not loader.batch_size:  # a DataLoader with its own batch_sampler
        return f"{len(loader):,} {split} batches"
    # The sampler of a DataLoader may select samples, so count those. But with drop_last, an
    # incomplete last batch is left out, so there are never more samples than fit in the batches.
    samples = loader.labels if isinstance(loader, Loader) else loader.sampler
    return f"{min(len(samples), len(loader) * loader.batch_size):,} {split} samples"


def print_header(args, model, data):
    """Print one line with the device, the model and the dataset."""
    count = sum(parameter.numel() for parameter in model.parameters())
    network = f"{type(model).__name__} ({count:,} parameters)"
    samples = describe(data.eval_loader, data.split)
    if args.epochs > 0:
        samples = f"{describe(data.train_loader, 'training')}, {samples}"
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
    """Write the results of an epoch as a row of a CSV file; epoch 1 starts a new file.

    Raises UserError if the file cannot be written.
    """
    with os_error_as_user_error(file), open(file, "w" if epoch == 1 else "a") as log:
        if epoch == 1:
            log.write(f"epoch,train_loss,{data.split}_loss,{data.split}_accuracy,seconds\n")
        log.write(
            f"{epoch},{train_loss:.6f},{evaluation.loss:.6f},"
            f"{evaluation.accuracy:.6f},{seconds:.2f}\n"
        )


def report(args, data, evaluation):
    """Print the final report and, with --errors, draw the misclassified images.

    evaluation: from `evaluate` on data.eval_loader. Raises UserError as draw_errors does.
    """
    print("Training finished." if args.epochs > 0 else format_scores(data, evaluation))
    # A network may have fewer or more outputs than there are names. An output without a name gets
    # its number.
    outputs = len(evaluation.confusion)
    names = data.classes[:outputs] + [str(i) for i in range(len(data.classes), outputs)]
    if outputs > 50:
        print(f"No tables of {outputs:,} outputs; the confusion matrix is evaluation.confusion.")
    else:
        print_tables(evaluation.confusion, names)
    if args.errors:
        draw_errors(args.errors, evaluation, data.eval_loader, names)


def draw_errors(file, evaluation, loader, names):
    """Draw up to 100 misclassified images, most confident first, as a PNG file.

    The images are (H, W), (1, H, W) or (3, H, W). If an image has values outside [0, 1], it is
    rescaled to [0, 1]. Raises UserError if the loader shuffles, or if the file cannot be written.
    """
    confidence, predicted = evaluation.logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != evaluation.labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:100].tolist()
    # Pillow's built-in font has no letters outside ASCII.
    names = [name[:12] if name.isascii() else str(i) for i, name in enumerate(names)]
    # A cell has 120x140 pixels: an image of 84x84, three lines of text, and margins.
    sheet = Image.new("RGB", (1200, 140 * max(1, math.ceil(len(worst) / 10))), "white")
    # one sample after the other, so that only one batch is in memory
    samples = (sample for images, labels in loader for sample in zip(images, labels, strict=True))
    for i, (image, label) in enumerate(samples):
        if label != evaluation.labels[i]:
            raise UserError("cannot draw errors: eval_loader must not shuffle the images")
        if i in worst:
            row, column = divmod(worst.index(i), 10)
            x, y = column * 120 + 18, row * 140 + 4
            low, high = min(0, image.min()), max(1, image.max())
            picture = to_pil_image((image - low) / (high - low))
            sheet.paste(ImageOps.contain(picture, (84, 84), Image.BOX), (x, y))
            text = f"true: {names[label]}\npred: {names[predicted[i]]}\n{confidence[i]:.1%} sure"
            ImageDraw.Draw(sheet).text((x, y + 86), text, "black", font_size=13, spacing=2)
    with replacing(file) as temporary:
        sheet.save(temporary, "PNG")
    print(f"{file} shows {len(worst)} of {len(wrong)} mistakes.")


# ---- weights and files ----


@contextlib.contextmanager
def os_error_as_user_error(file):
    """Context manager: turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {reason(error)}; close the file, or choose another path"
        ) from error


@contextlib.contextmanager
def replacing(file):
    """Context manager: yields a temporary path to write to.

    If nothing fails, the file that was written there replaces `file`.
    """
    target = os.path.realpath(file)
    # The temporary file is in the same folder, so that replace() is atomic: the old file stays
    # until the new one is complete.
    temporary = Path(f"{target}.part")
    with os_error_as_user_error(file):
        try:
            yield temporary
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def save_weights(model, file):
    """Save the model's state dict; raise UserError if the file cannot be written."""
    # Save CPU tensors, so that a plain torch.load works on a machine without a GPU, too.
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    # Open the file here, because torch.save, given a path, does not report a full disk.
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
# You can skip the rest of the file. The numbers in this section were tried on 538 pictures of
# handwritten digits: photos, scans and drawings.


def find_ink(grey):
    """Return the amount of ink per pixel, (H, W) in [0, 1], from grey levels (H, W).

    The longer side of the picture has to have 256 pixels. Raises ValueError if there is hardly any
    contrast.
    """
    # Most pixels are paper, so the median is the level of the paper. If it is nearer to the darkest
    # pixel than to the lightest one, the ink is light: invert. But if a picture is cropped closely
    # around the digit 1, most of its pixels are ink. So first make the picture square, by
    # repeating its right or lower edge. Most of an edge is paper, because a digit rarely touches it
    # in more than a few places.
    height, width = grey.shape
    square = F.pad(grey[None], (0, 256 - width, 0, 256 - height), mode="replicate")
    if square.median() - grey.min() < grey.max() - square.median():
        grey = 255 - grey
    # Estimate the paper by the lightest pixel in each cell of a 10x10 grid. With larger cells, a
    # shadow would count as ink. A thick stroke that fills a cell would count as paper; therefore,
    # the estimate is at least half of the lightest pixel of the picture.
    paper = F.adaptive_max_pool2d(grey[None], 10).clamp(min=grey.max() / 2)  # (1, 10, 10)
    paper = F.avg_pool2d(paper, 3, stride=1, padding=1, count_include_pad=False)  # smooth
    ink = F.interpolate(paper[None], grey.shape, mode="bilinear")[0, 0] - grey
    # Most of the paper is slightly darker than the estimate, so it would count as a little ink.
    # Nearly always, at least 40% of the pixels are paper: the 40% with the least ink become 0.
    ink = (ink - ink.quantile(0.4)).clamp(min=0)
    # 30 of 255 is safe: in the 538 pictures, ink.max() was never below 99.
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
    # the ink of each component: bincount adds the second vector instead of counting
    total = torch.bincount(component.flatten(), cell_ink.flatten())
    border = component.clone()
    border[1:-1, 1:-1] = 0  # only the outermost cells remain (and 0, which has no ink)
    total[border.unique()] /= 100
    is_kept = total > 0.3 * total.max()  # for each component
    kept = is_kept[component].float()  # for each cell: 1 if its component is kept, otherwise 0
    kept = F.max_pool2d(kept[None, None], 3, stride=1, padding=1)  # 1 in the cells around it, too
    return ink * F.interpolate(kept, scale_factor=4)[0, 0]


def mnist_form(grey):
    """Convert a picture of a digit, grey levels (H, W) in [0, 255], to MNIST's format (1, 28, 28).

    The digit may be dark on light or the reverse, of any size, anywhere. As in MNIST, it is scaled,
    and its centre is moved to the middle of pixel (14, 14), where MNIST's training images have it
    on average; see LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
    recognition" (1998). Raises ValueError if there is hardly any contrast.
    """
    # The longer side becomes 256 pixels, the other one a multiple of 4. With fewer pixels, thin
    # strokes would vanish; with more, strokes would fall apart into several components.
    height, width = (4 * math.ceil(side * 64 / max(grey.shape)) for side in grey.shape)
    ink = main_components(find_ink(resize(grey[None], [height, width])[0]))
    drawn = (ink > 0.25).nonzero()  # (pixels, 2): the strokes, without their blurred edge
    longer = 1 + (drawn.amax(dim=0) - drawn.amin(dim=0)).max().item()
    # MNIST's digits have thick strokes, and 20 of 28 pixels on their longer side. Most people's
    # strokes are thinner. With 20 pixels, the middle of each stroke would be too far out: use 19.
    side = round(longer * 28 / 19)
    centre = drawn.float().mean(dim=0) + 0.5  # because the middle of pixel i is at i + 0.5
    top, left = (centre - side * 14.5 / 28).round().int().tolist()
    digit = resized_crop(ink[None], top, left, side, side, 28)  # 0 outside of the picture
    digit = digit / digit.max()
    # Bring the mean closer to that of MNIST's training images, 0.1307: this makes the strokes of a
    # pencil bolder, and those of a felt pen thinner. gamma solves mean**gamma = 0.1307,
    # which would be exact if all pixels were equal.
    gamma = math.log(0.1307) / math.log(digit.mean())
    return digit**gamma


def read_picture(file):
    """Read a picture file; return the image of its digit in MNIST's format (1, 28, 28).

    Raises the errors of Pillow if it cannot read the file, and ValueError if it finds no strokes.
    """
    image = ImageOps.exif_transpose(Image.open(file))  # upright, as the EXIF data say
    level, alpha = pil_to_tensor(image.convert("LA")).float()
    # What is transparent becomes white. But if nothing on white is darker than 225, the
    # strokes are white, too; then, what is transparent becomes black.
    on_black = level * alpha / 255
    on_white = on_black + 255 - alpha
    return mnist_form(on_white if on_white.min() < 225 else on_black)


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
        else:
            probabilities = model(image[None].to(args.device)).softmax(dim=1)
            confidence, digit = probabilities[0].max(dim=0)
            print(f"{file}: {digit} ({confidence:.1%})")
    if failures:
        reasons = "; ".join(failures)
        raise UserError(f"{reasons}; use JPEG or PNG files of one digit on plain paper")


# ---- options ----


def positive_int(text):
    """argparse type: an integer of at least 1; otherwise, raises ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def find_device(name):
    """argparse type: convert a name to a torch.device; `auto` prefers a GPU to the CPU.

    Raises argparse.ArgumentTypeError if the device cannot be used.
    """
    if name == "auto":
        found = torch.accelerator.is_available()
        name = str(torch.accelerator.current_accelerator()) if found else "cpu"
    try:
        # This raises an error if the driver is missing or the GPU is too old.
        torch.ones(1, device=name).item()
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # CUDA adds hints for programmers
        raise argparse.ArgumentTypeError(
            f"{name} cannot be used: {reason(first_line)}; try --device cpu"
        ) from error
    return torch.device(name)


def make_parser(description, one_cycle_lr):
    """Return an argparse parser with the options that both scripts share.

    one_cycle_lr: the learning rate of --one-cycle if --lr is not given.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(one_cycle_lr=one_cycle_lr)  # not an option, only a value for parse_args

    add = parser.add_argument_group("training").add_argument  # add(...) adds to this group
    add("--epochs", type=int, default=10, help="0: only evaluate (default: 10)")
    add("--batch-size", type=positive_int, default=100, help="images per step (default: 100)")
    add("--lr", type=float, help=f"default: 0.001, or {one_cycle_lr} with --one-cycle")
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it")
    add("--augment", action="store_true", help="rotate, scale and shift training images at random")
    add("--seed", type=int, default=0, help="same seed and machine: same weights (default: 0)")
    add("--device", type=find_device, default="auto", help="cpu, cuda, cuda:1, mps, ... or auto")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="default: mnist; offline: synthetic")
    add("--data-dir", default="data", help="dataset folder (default: data)")
    add("--limit", type=positive_int, help="train on the first LIMIT training images")
    add("--validate", type=positive_int, help="hold out the last VALIDATE images to evaluate on")

    add = parser.add_argument_group("results").add_argument
    add("--log", help="CSV file for the losses, accuracy and time of each epoch")
    add("--save", help="file for the weights, written after each epoch, as a state dict")
    add("--load", help="file that --save wrote; start from its weights")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: classify digits in pictures")
    add("--errors", metavar="FILE.png", help="at the end, draw misclassified images")
    return parser


def parse_args(parser, argv, data=None):
    """Parse `argv`, a list or a string (None: the command line), and check the options.

    data: the caller's own Data, if any; with it, some options are refused. Ends the program
    (SystemExit, status 2) if an option is wrong; raises UserError if a file cannot be written.
    """
    if argv is None:
        # In a console, such as a notebook's, sys.argv has the console's arguments, not ours. In
        # most consoles, __main__ has no file. In Visual Studio Code and PyCharm, __main__ has a
        # file, but sys.argv[0] ends with one of these names.
        consoles = ("kernel_launcher.py", "pydevconsole.py")
        has_file = hasattr(sys.modules["__main__"], "__file__")
        argv = sys.argv[1:] if has_file and not sys.argv[0].endswith(consoles) else []
    elif isinstance(argv, str):
        argv = argv.split()
    args = parser.parse_args([str(word) for word in argv])
    if args.lr is None:
        args.lr = args.one_cycle_lr if args.one_cycle else 0.001
    if args.predict and not args.load:
        parser.error("argument --predict: needs trained weights; add --load FILE")
    if args.predict and args.dataset not in ("mnist", "synthetic"):
        parser.error(f"argument --predict: reads only digits, and {args.dataset} has none")
    if args.errors and not args.errors.lower().endswith(".png"):
        parser.error("argument --errors: the file name must end in .png")
    if data and (args.limit or args.validate or args.batch_size != 100):
        parser.error("--limit, --validate, --batch-size: split and batch your own data yourself")
    # A DataLoader that shuffles has a RandomSampler, SubsetRandomSampler or WeightedRandomSampler;
    # the text of each contains "Random".
    if data and args.errors and "Random" in str(getattr(data.eval_loader, "sampler", "")):
        parser.error("argument --errors: eval_loader must not shuffle the images")
    for file in filter(None, (args.save, args.log, args.errors)):
        folder = os.path.dirname(os.path.realpath(file))  # for a link: the folder of its target
        if os.path.isdir(file) or not os.access(folder, os.W_OK):
            raise UserError(
                f"cannot write {file}: it is a folder, or its folder does not exist "
                "or is write-protected; choose another path"
            )
    return args


# ---- setup and errors ----


def set_up(seed):
    """Set the random seed, and change GPU, memory and printing settings of the whole process."""
    torch.manual_seed(seed)
    # With these two settings, a GPU computes the same weights for the same seed. The second one is
    # from https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html; it gives the library
    # for matrix products two buffers of 4,096 KiB.
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    # On Linux, the C library (glibc) returns freed memory to the system, and getting it back for
    # the next training step takes time. With these settings, the process keeps it: see mallopt(3).
    with contextlib.suppress(OSError, AttributeError):  # on a system without glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: treat large blocks like small ones
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory is returned
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        # Show progress immediately, also in a pipe; print "?" for a letter that cannot be encoded.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do."""

    def _render_traceback_(self):  # IPython shows this instead of a traceback
        return [f"error: {self}"]


def reason(error):
    """Return the first sentence of an error's message, in at most 200 characters."""
    message = str(error) or type(error).__name__
    return textwrap.shorten(message, 200, placeholder=" ...").partition(". ")[0]


def run(main):
    """Run main() as a program and return its result.

    A UserError is printed as one line, with exit status 1; Ctrl-C gives status 130.
    """
    # The stdout of notebooks and IDEs has no method reconfigure. They display errors themselves.
    if not hasattr(sys.stdout, "reconfigure"):
        return main()
    try:
        return main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # EPIPE, on Windows EINVAL: the program that reads our output, such as `head`, has ended, so
        # nothing more can be printed. sys.exit would try to print the rest; os._exit does not.
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise
        os._exit(1)
