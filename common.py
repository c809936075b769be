"""What cnn_mnist.py and rnn_mnist.py share.

To understand the training, read the first section, "core". Look up the others when you need them:
"data", "files", "pictures of your own" (--predict), "command line".
"""

import argparse
import copy
import ctypes
import io
import math
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize, resized_crop, to_pil_image
from torchvision.utils import make_grid

# ---- core ----
# If you have to hand in a single file, copy this section into it, together with a network and
# train(). It needs the imports of ctypes, math, os, sys, dataclass, NamedTuple, torch and F.


@dataclass
class Loader:
    """Iterate over batches of inputs (N, ...) and labels (N,); they stay on their device.

    With shuffle, each iteration has a new random order. torch's DataLoader is slower, because it
    collects a batch sample by sample.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    shuffle: bool = False

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for indices in order.to(self.labels.device).split(self.batch_size):
            yield self.inputs[indices], self.labels[indices]


class Data(NamedTuple):
    """The data to train and evaluate on.

    train_loader, eval_loader: Loaders, DataLoaders or lists of batches; each batch has inputs
    (N, ...) for the network and labels (N,), int64, from 0 to C - 1 for C classes. classes: their
    names, in the order of the network's outputs. split: "test" or "validation", depending on what
    eval_loader contains. device: where to train; see find_device().
    """

    train_loader: object
    eval_loader: object
    classes: list
    split: str = "test"
    device: object = "auto"


def find_device(name):
    """Return the torch.device of this name; "auto": an accelerator (a GPU), otherwise the CPU."""
    if name == "auto":
        accelerator = torch.accelerator
        name = accelerator.current_accelerator() if accelerator.is_available() else "cpu"
    return torch.device(name)


def as_tensors(inputs, labels, device):
    """Convert inputs (N, ...) to a float tensor, labels (N,) to int64, and move both to the device.

    They may be arrays, tensors or lists. Inputs of type uint8 are treated as images: they are
    divided by 255, and (N, H, W) becomes (N, 1, H, W). Raises ValueError if there are no inputs, if
    there are more or fewer labels than inputs, or if a label is not a whole number.
    """
    inputs, labels = torch.as_tensor(inputs), torch.as_tensor(labels)
    if not 0 < len(inputs) == len(labels):
        raise ValueError(f"each input needs a label: {len(inputs)} inputs, {len(labels)} labels")
    if (labels % 1).any():
        raise ValueError("labels must be whole numbers: the classes, numbered from 0")
    if inputs.dtype == torch.uint8:
        inputs = inputs / 255
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(1)  # (N, 1, H, W)
    return inputs.float().to(device), labels.long().to(device)


def make_data(train_pair, eval_pair, classes, split="test", batch_size=100, device="auto"):
    """Make a Data of two pairs (inputs, labels): one to train on, shuffled, and one to evaluate on.

    For what a pair may contain, and for the errors, see as_tensors(); for the rest, see Data.
    """
    device = find_device(device)
    # The stars pass the elements of a pair as two arguments.
    train_loader = Loader(*as_tensors(*train_pair, device), batch_size, shuffle=True)
    eval_loader = Loader(*as_tensors(*eval_pair, device), batch_size)
    return Data(train_loader, eval_loader, list(classes), split, device)


@torch.no_grad()  # Recording the operations for backward() would take time and memory.
def predict(model, inputs):
    """Return the model's logits (N, C) for a batch of inputs (N, ...), which may be on any device.

    They have to be scaled as for training, such as images to [0, 1]. The network computes in
    evaluation mode; then, its mode is restored.
    """
    device = next(model.parameters()).device  # where the first weights of the model are
    training = model.training
    model.eval()
    logits = model(inputs.to(device))
    model.train(training)
    return logits


class Evaluation(NamedTuple):
    """The result of evaluate(), for N samples and C classes. Its tensors are on the CPU."""

    loss: float  # mean over the samples
    accuracy: float  # in [0, 1]
    confusion: torch.Tensor  # (C, C), int64: rows are true classes, columns are predictions
    logits: torch.Tensor  # (N, C), in the order of the loader
    labels: torch.Tensor  # (N,), int64, in the same order (new each time if the loader shuffles)


def evaluate(model, loader):
    """Return the Evaluation of the model on all samples of the loader.

    model: maps inputs to logits (N, C), for C classes. loader: batches of inputs and labels (N,);
    they may be on any device.
    """
    all_logits, all_labels = [], []
    for inputs, labels in loader:
        all_logits.append(predict(model, inputs))
        all_labels.append(labels)
    logits = torch.cat(all_logits).cpu()
    labels = torch.cat(all_labels).cpu().long()  # int64, even if the loader has uint8
    loss = F.cross_entropy(logits, labels).item()
    # one_hot makes a row for each sample, with 1 at its class and 0 elsewhere. In the matrix
    # product, each sample then counts 1, in the row of its label and the column of its prediction.
    num_classes = logits.shape[1]
    predicted = F.one_hot(logits.argmax(dim=1), num_classes)  # (N, C)
    confusion = F.one_hot(labels, num_classes).T @ predicted  # (C, N) @ (N, C)
    accuracy = confusion.trace().item() / len(labels)  # trace: the sum of the diagonal
    return Evaluation(loss, accuracy, confusion, logits, labels)


def format_scores(evaluation, split):
    """Format the loss and accuracy of an evaluation."""
    return (
        f"{split.capitalize()} loss: {evaluation.loss:.4f}, "
        f"{split.capitalize()} accuracy: {evaluation.accuracy:.2%}"
    )


def check_names(outputs, names):
    """Raise ValueError if there are not as many names as outputs of the network."""
    if len(names) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs of the network, but {len(names)} class names")


def print_tables(confusion, names):
    """Print precision, recall, F1 and count of each class, then the confusion matrix (C, C).

    Raises ValueError if the number of names is not C, the number of the network's outputs.
    """
    check_names(confusion, names)
    names = list(map(str, names))
    # the numbers of correct, predicted and true samples of each class
    hits, predicted, counts = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    # clamp avoids 0 / 0: a class without predictions or without samples gets 0.
    precision, recall = hits / predicted.clamp(min=1), hits / counts.clamp(min=1)
    # F1 is 2 * precision * recall / (precision + recall). This is the same, without 0 / 0:
    f1 = 2 * hits / (predicted + counts).clamp(min=1)
    width = max(12, 2 + max(map(len, names)))
    print(f"{'Class':<{width}}{'Precision':>10}{'Recall':>10}{'F1':>10}{'Count':>10}")
    for i, name in enumerate(names):
        print(
            f"{name:<{width}}{precision[i]:>10.4f}{recall[i]:>10.4f}{f1[i]:>10.4f}{counts[i]:>10}"
        )
    print("Confusion matrix (rows: true classes, columns: predicted classes):")
    column = max(5, 50 // len(names))  # 50 characters for all names, but at least 5 for each
    print(" " * width + "".join(f" {name[:column]:>{column}}" for name in names))
    for i, name in enumerate(names):
        print(f"{name:<{width}}" + "".join(f" {count:>{column}}" for count in confusion[i]))


class Epoch(NamedTuple):
    """The results of an epoch. The losses are means over the samples, the accuracy is in [0, 1]."""

    epoch: int
    train_loss: float
    eval_loss: float
    eval_accuracy: float
    seconds: float  # to train, without the evaluation


def check_results(train_loss, evaluation, classes):
    """Raise FloatingPointError if a loss is infinite or NaN, ValueError as check_names() does."""
    if not math.isfinite(train_loss + evaluation.loss):
        raise FloatingPointError(
            "the loss is not finite; try a smaller learning rate, "
            "or look for values in the data that are not finite"
        )
    check_names(evaluation.confusion, classes)


def keep_freed_memory():
    """Make training on a CPU faster, on Linux. The setting lasts until the process ends."""
    # The C library returns freed memory to the system, and getting it back for the next training
    # step takes time. With these settings, the process keeps it: see `man mallopt`.
    if sys.platform == "linux":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the same memory as small ones
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory is returned


def create_model(network, seed, device):
    """Set the random seed, create a network, print its size, and return it and its device.

    network: a class or function that returns a network; it is called after the seed is set, so that
    the seed decides the initial weights. Raises TypeError if it is a Module. device: see
    find_device(). The settings of GPU and memory hold for the whole process.
    """
    if isinstance(network, torch.nn.Module):
        raise TypeError(
            "pass CNN or lambda: RNN(64), not CNN(); lambda: model trains the same model further"
        )
    # With these two settings, an NVIDIA GPU, too, gives the CNN and the LSTM the same weights for
    # the same seed. The second one (for matrix products: two buffers of 4,096 KiB) is for the LSTM:
    # see https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    keep_freed_memory()
    torch.manual_seed(seed)
    device = find_device(device)
    model = network()
    model.to(device)  # moves the network itself; a tensor's to() returns a new one
    model.eval()  # evaluation mode: dropout is off, and BatchNorm uses what it has learned
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"Device: {device}, Model: {type(model).__name__} ({count:,} parameters)")
    return model, device


def random_affine(images, shift, degrees=10, scale=0.1):
    """Apply a different random shift, rotation and scaling to each square image (N, C, S, S).

    shift (in pixels of the input, along each axis), degrees and scale (a fraction) are the largest
    changes, in both directions. What comes from outside of an image is 0.
    """
    count, _, _, size = images.shape
    angle, zoom, dx, dy = torch.empty(4, count, device=images.device).uniform_(-1, 1)  # each (N,)
    angle = angle * math.radians(degrees)
    zoom = 1 + zoom * scale
    # affine_grid takes the inverse map: where in the input the value of each output pixel comes
    # from. So the position is rotated, divided by zoom, and shifted. (The signs of angle and shift
    # do not matter, because positive and negative ones are equally probable.)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift = shift * 2 / size  # For affine_grid, positions in the image go from -1 to 1.
    entries = [cos, -sin, dx * shift, sin, cos, dy * shift]
    theta = torch.stack(entries, dim=1).view(-1, 2, 3)  # a matrix of 2 rows for each image
    grid = F.affine_grid(theta, images.shape, align_corners=False)  # (N, S, S, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (N, C, S, S), interpolated


# ---- data ----


class UserError(Exception):
    """An error that the user can fix. The scripts print its message instead of a traceback."""


def reason(error):
    """Return the first sentence of an error's message, in at most 200 characters."""
    return textwrap.shorten(str(error), 200).partition(". ")[0]


DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "synthetic": datasets.MNIST,  # drawn by draw_digits; MNIST gives the names of the classes
}


def read_dataset(name, data_dir):
    """Read a torchvision dataset from `data_dir`; download it if it is missing.

    Returns the training and the test split, each as uint8 images (N, 28, 28) and int64 labels (N,).
    Raises UserError if the dataset can be neither read nor downloaded.
    """
    dataset = DATASETS[name]
    try:
        splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision has no exception type for failed downloads and reads
        raise UserError(
            f"cannot read or download {data_dir}/{dataset.__name__}/raw: {reason(error)}; check "
            "--data-dir; after an interrupted download, move that folder away to download again; "
            "without internet access, use --dataset synthetic"
        ) from error
    return [(split.data, split.targets) for split in splits]


def draw_digits(count):
    """Draw synthetic digits: uint8 images (N, 28, 28) and labels (N,)."""
    pictures = []
    for digit in "0123456789":
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), digit, "white", font_size=24, anchor="mm")
        pictures.append(pil_to_tensor(picture).float())
    digits = torch.stack(pictures)  # (10, 1, 28, 28)
    labels = torch.randint(10, (count,))
    # A strong distortion (4 pixels, 30 degrees, 40%) makes these digits about as hard to learn as
    # MNIST. 500 images at a time fit in the CPU's cache, which is faster.
    # part: 500 labels; digits[part]: the picture of each, (500, 1, 28, 28).
    parts = [random_affine(digits[part], 4, 30, 0.4) for part in labels.split(500)]
    return torch.cat(parts).round().byte().squeeze(1), labels


def load_data(
    dataset="mnist", data_dir="data", limit=math.inf, validate=0, batch_size=100, device="auto"
):
    """Return the Data of a dataset, on the device: its images are (N, 1, 28, 28) in [0, 1].

    dataset: a key of DATASETS. limit: train on this many images, the first ones. validate: hold out
    this many training images, the last ones, and evaluate on them instead of the test images.
    Raises UserError if the dataset can be neither read nor downloaded, or if no images are left.
    """
    if dataset == "synthetic":
        with torch.random.fork_rng([]):  # Afterwards, the CPU's random numbers go on as before.
            torch.manual_seed(0)  # the same digits in each run
            train, held_out = draw_digits(60_000), draw_digits(10_000)
    else:
        train, held_out = read_dataset(dataset, data_dir)
    count = min(len(train[0]) - validate, limit)
    if validate < 0 or count < 1:
        raise UserError(f"validate={validate}, limit={limit}: negative, or no images are left")
    split = "test"
    if validate:
        split, held_out = "validation", [tensor[-validate:] for tensor in train]
    train = [tensor[:count] for tensor in train]
    print(f"Data: {dataset} ({count:,} training, {len(held_out[0]):,} {split} images)")
    # torchvision's names for MNIST are "0 - zero" and so on.
    classes = [name.partition(" - ")[0] for name in DATASETS[dataset].classes]
    return make_data(train, held_out, classes, split, batch_size, device)


# ---- files ----


def write_file(file, content):
    """Write bytes to a file. An old file stays until the new one is complete.

    Raises UserError if the file cannot be written.
    """
    part = Path(f"{file}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {reason(error)}; choose another path") from error
    finally:
        part.unlink(missing_ok=True)


def save_weights(model, file):
    """Save the model's state dict: its weights by name. Raises UserError as write_file does."""
    # Save CPU tensors, so that a plain torch.load works on a machine without a GPU, too.
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    torch.save(weights, content)
    write_file(file, content.getvalue())


def load_weights(model, file):
    """Load a state dict into the model, and return the model in evaluation mode.

    Raises UserError, and leaves the model as it was, if the file cannot be read, or has the weights
    of another network. Code that the file may contain is never run.
    """
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        copy.deepcopy(model).load_state_dict(weights)  # An error would leave it half loaded.
        model.load_state_dict(weights)
    except Exception as error:  # for an invalid file, torch may raise almost any exception
        raise UserError(
            f"cannot load {file} ({reason(error)}); use a file that --save wrote "
            f"for the network {type(model).__name__}, with layers of the same size"
        ) from error
    return model.eval()


def write_log(history, split, file):
    """Write a CSV file with a row for each Epoch in `history`; raise UserError as write_file does.

    split: "test" or "validation", for the names of the columns.
    """
    text = f"epoch,train_loss,{split}_loss,{split}_accuracy,seconds\n"
    for row in history:
        text += f"{row.epoch},{row.train_loss:.6f},{row.eval_loss:.6f},"
        text += f"{row.eval_accuracy:.6f},{row.seconds:.2f}\n"
    write_file(file, text.encode())


def draw_errors(model, data, file):
    """Draw up to 100 misclassified images of data.eval_loader as a PNG file, most confident first.

    The images are (H, W), (1, H, W) or (3, H, W); each one is rescaled, from its lowest value to
    its highest one. The font has only ASCII letters: to draw other names, translate them in
    data._replace(classes=...). Raises UserError as write_file does.
    """
    count, worst = 0, []  # worst: confidence, label, prediction and image of each mistake
    for images, labels in data.eval_loader:
        confidence, predicted = predict(model, images).softmax(dim=1).cpu().max(dim=1)
        wrong = (predicted != labels.cpu()).nonzero().flatten().tolist()
        count += len(wrong)
        # a clone, because images[i] alone would keep its whole batch in memory
        worst += [(confidence[i], labels[i], predicted[i], images[i].clone()) for i in wrong]
        worst = sorted(worst, key=lambda mistake: mistake[0], reverse=True)[:100]
    sheet = Image.new("RGB", (1200, 1400), "white")
    for i, (confidence, label, predicted, image) in enumerate(worst):
        # A cell has 120x140 pixels: an image of 84x84, three lines of text, and margins.
        x, y = i % 10 * 120 + 18, i // 10 * 140 + 4
        picture = to_pil_image(make_grid(image.cpu(), normalize=True))
        sheet.paste(picture.resize((84, 84), Image.BOX), (x, y))
        classes = f"true: {data.classes[label]!s:.12}\npred: {data.classes[predicted]!s:.12}"
        text = f"{classes}\nconf.: {confidence:.1%}"
        ImageDraw.Draw(sheet).text((x, y + 86), text, "black", font_size=13, spacing=2)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_file(file, content.getvalue())
    print(f"{file} shows {len(worst)} of {count} mistakes.")


# ---- pictures of your own ----
# You can skip this section. Its numbers were tried on 538 pictures of handwritten digits: photos,
# scans and drawings.


def find_ink(grey):
    """Return the amount of ink per pixel, (1, H, W) in [0, 1], from grey levels (1, H, W).

    The longer side of the picture has to have 256 pixels. Raises ValueError if there is hardly any
    contrast.
    """
    # Most pixels are paper, so the median is the level of the paper. If it is nearer to the darkest
    # pixel than to the lightest one, the ink is light: invert. But if a picture is cropped closely
    # around the digit 1, most of its pixels are ink. So first make the picture square, by
    # repeating its right or lower edge. Most of an edge is paper, because a digit rarely touches it
    # in more than a few places.
    _, height, width = grey.shape
    square = F.pad(grey, (0, 256 - width, 0, 256 - height), mode="replicate")
    if square.median() < (grey.min() + grey.max()) / 2:
        grey = 255 - grey
    # Estimate the paper by the lightest pixel in each cell of a 10x10 grid. In larger cells, shadow
    # would count as ink. A thick stroke that fills a cell would count as paper; therefore, the
    # estimate is at least half of the lightest pixel of the picture.
    paper = F.adaptive_max_pool2d(grey, 10).clamp(min=grey.max() / 2)  # (1, 10, 10)
    paper = F.avg_pool2d(paper, 3, stride=1, padding=1, count_include_pad=False)  # smooth
    ink = F.interpolate(paper[None], (height, width), mode="bilinear")[0] - grey
    # Most of the paper is slightly darker than the estimate, so it would count as a little ink.
    # Nearly always, at least 40% of the pixels are paper: the 40% with the least ink become 0.
    ink = (ink - ink.quantile(0.4)).clamp(min=0)
    # 30 of 255 is safe: in the 538 pictures, ink.max() was never below 99.
    if ink.max() < 30:
        raise ValueError("no strokes found")
    return ink / ink.max()


def main_components(ink):
    """Keep the connected components (separate pieces) with the most ink; set all other ink to 0.

    ink: (1, H, W) in [0, 1], H and W multiples of 4; returns the same shape. A component is kept if
    it has more than 0.3 times as much ink as the component with the most ink, so the second stroke
    of a 4 is kept. If a component touches the border, its ink counts only 1/100 in this comparison,
    because in a photo, the dark edge of a desk can have far more ink than the digit.
    """
    # Mark the cells of 4x4 pixels that contain ink. This closes small gaps, and ignores noise.
    drawn = F.max_pool2d(ink, 4) > 0.3  # (1, H / 4, W / 4)
    # Each cell starts with its own number, and then repeatedly takes the highest number of its
    # neighbours, until all cells of a component have the same one. 0 is the background.
    component = torch.arange(1, drawn.numel() + 1).view(drawn.shape) * drawn
    while True:
        spread = F.max_pool2d(component, 3, stride=1, padding=1) * drawn
        if spread.equal(component):
            break
        component = spread
    cell_ink = F.avg_pool2d(ink, 4) * drawn
    # the ink of each component: bincount adds the second vector instead of counting
    total = torch.bincount(component.flatten(), cell_ink.flatten())
    border = component.clone()
    border[:, 1:-1, 1:-1] = 0  # only the outermost cells remain (and 0, which has no ink)
    total[border.unique()] /= 100
    is_kept = total > 0.3 * total.max()  # for each component
    kept = is_kept[component].float()  # for each cell: 1 if its component is kept, otherwise 0
    kept = F.max_pool2d(kept, 3, stride=1, padding=1)  # 1 in the cells around it, too
    return ink * F.interpolate(kept[None], scale_factor=4)[0]


def mnist_form(grey):
    """Convert a picture of a digit, grey levels (1, H, W) in [0, 255], to MNIST's (1, 28, 28).

    The digit may be dark on light or the reverse, of any size, anywhere. As in MNIST, it is scaled,
    and its centre of mass is moved to the middle of pixel (14, 14), where MNIST's training images
    have it on average; see LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to
    document recognition" (1998). Raises ValueError if there is hardly any contrast.
    """
    # The longer side becomes 256 pixels, the other one a multiple of 4. With fewer pixels, thin
    # strokes would vanish; with more, strokes would fall apart into several components.
    sides = [4 * math.ceil(side * 64 / max(grey.shape)) for side in grey.shape[1:]]
    ink = main_components(find_ink(resize(grey, sides)))
    drawn = (ink[0] > 0.25).nonzero()  # (pixels, 2): the strokes, without their blurred edge
    longer = 1 + (drawn.amax(dim=0) - drawn.amin(dim=0)).max().item()
    # MNIST's digits have thick strokes, and 20 of 28 pixels on their longer side. Most people's
    # strokes are thinner. With 20 pixels, such a digit would be too large: use 19.
    side = round(longer * 28 / 19)
    centre = drawn.float().mean(dim=0) + 0.5  # because the middle of pixel i is at i + 0.5
    top, left = (centre - side * 14.5 / 28).round().int().tolist()
    digit = resized_crop(ink, top, left, side, side, 28)  # 0 outside of the picture
    digit = digit / digit.max()
    # Bring the mean closer to that of MNIST's training images, 0.1307: this makes the strokes of a
    # pencil bolder, and those of a felt pen thinner. gamma solves mean**gamma = 0.1307, so it would
    # be exact if all pixels were equal.
    gamma = math.log(0.1307) / math.log(digit.mean())
    return digit**gamma


def read_picture(file):
    """Read a picture file; return the image of its digit in MNIST's format (1, 28, 28).

    Raises the errors of Pillow if it cannot read the file, and ValueError if it finds no strokes.
    """
    image = ImageOps.exif_transpose(Image.open(file))  # upright, as the EXIF data say
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert("LA") would cut off at 255
        image = image.convert("I").point(lambda level: level / 257)
    level, alpha = pil_to_tensor(image.convert("LA")).float().split(1)  # each (1, H, W)
    # What is transparent becomes white. But if nothing on white is darker than 225, the
    # strokes are white, too; then, what is transparent becomes black.
    on_black = level * alpha / 255
    on_white = on_black + 255 - alpha
    return mnist_form(on_white if on_white.min() < 225 else on_black)


def predict_pictures(model, files, classes):
    """Print the predicted digit in each picture, and the network's confidence.

    Raises UserError at the end if a picture cannot be read, ValueError as check_names() does.
    """
    failures = []
    for file in files:
        try:
            image = read_picture(file)
        except Exception as error:  # for an invalid picture, Pillow may raise almost any exception
            failures.append(f"cannot read a digit from {file}: {reason(error)}")
        else:
            logits = predict(model, image[None])[0]  # (C,)
            check_names(logits, classes)
            confidence, digit = logits.softmax(dim=0).max(dim=0)
            print(f"{file}: {classes[digit]} ({confidence:.1%})")
    if failures:
        raise UserError(f"{'; '.join(failures)}; use JPEG or PNG files of one digit on plain paper")


# ---- command line ----


def positive_int(text):
    """argparse type: an integer of at least 1; otherwise, raises ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def working_device(name):
    """argparse type: a torch.device that can compute; otherwise, raises ArgumentTypeError."""
    try:
        device = find_device(name)
        torch.ones(1, device=device).item()  # fails if the driver is missing or the GPU is too old
    except Exception as error:
        raise argparse.ArgumentTypeError(
            f"{name} cannot be used: {reason(error)}; try --device cpu"
        ) from error
    return device


def output_file(name):
    """argparse type: a file that can be written; otherwise, raises ArgumentTypeError."""
    file = Path(name)
    if not os.access(file.parent, os.W_OK) or file.exists() and not file.is_file():
        raise argparse.ArgumentTypeError(
            f"cannot write {name}: choose a file in a folder that you may write to"
        )
    return name


def make_parser(description):
    """Return an argparse parser with the options that both scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("training").add_argument  # add(...) adds to this group
    add("--epochs", type=int, default=10, help="default: %(default)s; 0: only evaluate")
    add("--batch-size", type=positive_int, default=100, help="default: %(default)s")
    add("--lr", type=float, help="default: 0.001; with --one-cycle 0.01 (CNN) or 0.005 (LSTM)")
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it")
    add("--augment", action="store_true", help="rotate, scale and shift training images at random")
    add("--seed", type=int, default=0, help="default: %(default)s; decides all random numbers")
    add("--device", type=working_device, default="auto", help="cpu, cuda, cuda:1, mps, ... or auto")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="default: mnist; offline: synthetic")
    add("--data-dir", default="data", help="dataset folder (default: %(default)s)")
    add("--limit", type=positive_int, default=math.inf, help="train on the first LIMIT images")
    add(
        "--validate",
        type=positive_int,
        default=0,
        help="hold out the last VALIDATE training images, and evaluate on them",
    )

    add = parser.add_argument_group("results").add_argument
    add("--log", type=output_file, help="CSV file for the results of each epoch")
    add("--save", type=output_file, help="file for the weights, written after each epoch")
    add("--load", help="start from weights that --save wrote; to train on, change --seed")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: only classify pictures")
    add("--errors", type=output_file, help="PNG file: draw misclassified images")
    return parser


def parse_args(parser, argv):
    """Parse `argv`, a list (by default sys.argv), and check the options."""
    if argv is None:
        # In a console, such as a notebook's, sys.argv has the console's arguments, not ours. There,
        # sys.argv[0] ends with one of these names.
        consoles = ("kernel_launcher.py", "pydevconsole.py", "__main__.py")
        argv = [] if sys.argv[0].endswith(consoles) else sys.argv[1:]
    args = parser.parse_args(argv)
    if args.predict and not args.load:
        parser.error("argument --predict: needs trained weights; add --load FILE")
    if args.predict and DATASETS[args.dataset] is not datasets.MNIST:
        parser.error(f"argument --predict: reads only digits, and {args.dataset} has none")
    if args.epochs < 1 and (args.epochs or args.save or args.log):
        parser.error("argument --epochs: must be at least 1, or 0 without --save and --log")
    return args


def run_command(args, network, train):
    """Do what the command line asks for; return the network and its Evaluation.

    network, train: the script's network and its train(). With --predict, there is no Evaluation.
    """
    if args.load:
        loaded = load_weights(network(), args.load).to(args.device)
    if args.predict:
        predict_pictures(loaded, args.predict, "0123456789")
        return loaded, None
    create = (lambda: loaded) if args.load else network
    data = load_data(
        args.dataset, args.data_dir, args.limit, args.validate, args.batch_size, args.device
    )

    def after_epoch(model, history):
        if args.save:
            save_weights(model, args.save)
        if args.log:
            write_log(history, data.split, args.log)

    model, history = train(
        create,
        data,
        epochs=args.epochs,
        lr=args.lr,
        one_cycle=args.one_cycle and args.epochs > 0,  # the schedule needs at least one step
        augment=args.augment,
        seed=args.seed,
        after_epoch=after_epoch,
    )
    evaluation = evaluate(model, data.eval_loader)
    print("Training finished." if history else format_scores(evaluation, data.split))
    print_tables(evaluation.confusion, data.classes)
    if args.errors:
        draw_errors(model, data, args.errors)
    return model, evaluation


def run(main):
    """Run main() as a program, and return its result.

    An error that the user can fix is printed as one line, with exit status 1; Ctrl-C gives 130.
    """
    try:
        result = main()
        sys.stdout.flush()  # so that a closed pipe fails here, not at the exit
        return result
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # The program that reads our output, such as `head`, has ended.
        os._exit(1)  # sys.exit would try to print the rest.
