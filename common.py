"""What cnn_mnist.py and rnn_mnist.py share.

To understand the training, read the first section, "core". Look up the others when you need them:
"conversion and checks", "tables and augmentation", "data", "files", "pictures of your own"
(--predict), "command line".
"""

import argparse
import copy
import io
import math
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, resize, resized_crop, to_pil_image
from torchvision.utils import make_grid

# ---- core ----
# If you have to hand in a single file, copy everything from here to the section "data" into it,
# after these imports: math, os, time, NamedTuple, torch, nn and F. A network and train() follow.
# You may leave out the settings for speed and repeatable results in create_model(), and those of
# make_data(), print_tables() and random_affine() that you do not call.


def find_device(name):
    """Return the torch.device of this name; "auto": an accelerator (a GPU), otherwise the CPU."""
    if name == "auto":
        accelerator = torch.accelerator
        name = accelerator.current_accelerator() if accelerator.is_available() else "cpu"
    return torch.device(name)


class Loader:
    """Iterate over batches of inputs (N, ...) and labels (N,); they stay on their device.

    With shuffle, each iteration has a new random order. torch's DataLoader is slower: by default,
    it collects a batch sample by sample.
    """

    def __init__(self, inputs, labels, batch_size, shuffle=False):
        self.inputs = inputs
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for indices in order.to(self.labels.device).split(self.batch_size):
            yield self.inputs[indices], self.labels[indices]


class Data:
    """The data to train, validate and test on.

    The loaders are Loaders, DataLoaders or lists of batches; each batch has inputs (N, ...) for the
    network and labels (N,), integers from 0 to C - 1 for C classes. val_loader: the samples on
    which networks and options are compared. classes: the names of the classes, in the order of the
    network's outputs. test_loader: the samples for the final test; train() never uses them. device:
    where to train; see find_device().
    """

    def __init__(self, train_loader, val_loader, classes, *, test_loader=None, device="auto"):
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.classes = list(classes)
        self.test_loader = test_loader
        self.device = find_device(device)


def create_model(network, seed):
    """Set the random seed, then create the network, so that the seed decides its initial weights.

    network: a class or function that returns a network, a new one at each call. Raises TypeError if
    it is an nn.Module, or returns the same network twice, which may be trained already. The
    settings for repeatable results and for speed hold for the whole process.
    """
    if isinstance(network, torch.nn.Module) or network() is network():
        raise TypeError("pass a class or a function that creates a new network: CNN, not CNN()")
    # For repeatable results: without these two settings, an NVIDIA GPU may give other weights for
    # the same seed. The second one is for the LSTM (its value: two buffers of 4,096 KiB); see
    # https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    # For speed, on a CPU with Linux: without this line, the C library returns freed memory to the
    # system, and gets it back in the next step. These 31 MiB are freed at once, which makes it keep
    # freed blocks of up to this size from now on: see M_MMAP_THRESHOLD in `man mallopt`.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    torch.manual_seed(seed)
    return network().eval()  # evaluation mode, until the training starts


@torch.no_grad()  # Recording the operations for backward() would take time and memory.
def predict(model, inputs):
    """Return the model's logits (N, C) for a batch of inputs (N, ...), which may be on any device.

    Scale the inputs as for training, such as images to [0, 1]. The network computes in evaluation
    mode. Then, if it was in training mode, all its layers are set to training mode.
    """
    device = next(model.parameters(), inputs).device  # that of its weights, if there are any
    training = model.training
    model.eval()
    logits = model(inputs.to(device))
    model.train(training)
    return logits


class Evaluation(NamedTuple):
    """The result of evaluate(), for N samples and C classes. Its tensors are on the CPU.

    The area under the ROC curve (AUC), with scikit-learn and `import sklearn.metrics`:
    sklearn.metrics.roc_auc_score(labels.numpy(), logits.softmax(1).numpy(), multi_class="ovr");
    if there are only two classes, take logits.softmax(1)[:, 1].numpy(), and no multi_class.
    """

    loss: float  # of the criterion, for all samples at once
    accuracy: float  # in [0, 1]
    confusion: torch.Tensor  # (C, C), int64: rows are true classes, columns are predictions
    logits: torch.Tensor  # (N, C), in the order of the loader
    labels: torch.Tensor  # (N,), int64, in the same order (new each time if the loader shuffles)


def evaluate(model, loader, criterion=F.cross_entropy):
    """Return the Evaluation of the model on all samples of the loader.

    model: maps inputs to logits (N, C), for C classes. loader: batches of inputs and labels (N,);
    they may be on any device. criterion: maps logits and labels to the loss.
    """
    all_logits, all_labels = [], []
    for inputs, labels in loader:
        all_logits.append(predict(model, inputs))
        all_labels.append(labels)
    logits = torch.cat(all_logits)  # (N, C)
    labels = torch.cat(all_labels).to(logits.device).long()  # int64, even if the loader has uint8
    loss = criterion(logits, labels).item()
    logits, labels = logits.cpu(), labels.cpu()
    num_classes = logits.shape[1]
    # Give each pair of true and predicted class a number from 0 to C * C - 1, and count each.
    pairs = labels * num_classes + logits.argmax(dim=1)  # (N,)
    confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    accuracy = confusion.trace().item() / len(labels)  # trace: the sum of the diagonal
    return Evaluation(loss, accuracy, confusion, logits, labels)


class Epoch(NamedTuple):
    """The results of an epoch."""

    epoch: int  # its number, from 1
    train_loss: float  # the mean over the batches, each with the number of its samples as weight
    val_loss: float
    val_accuracy: float  # in [0, 1]
    seconds: float  # to train, without the evaluation


# ---- conversion and checks ----


def check_labels(labels, classes):
    """Raise ValueError if the labels are not (N,), whole numbers from 0 to C - 1, for C classes."""
    labels = torch.as_tensor(labels, dtype=torch.float64, device="cpu")
    if labels.dim() != 1 or not torch.isin(labels, torch.arange(len(classes))).all():
        raise ValueError(
            f"labels must be whole numbers (N,) from 0 to {len(classes) - 1}, for {len(classes)} "
            f"classes; these are {tuple(labels.shape)} from {labels.min():g} to {labels.max():g}"
        )


def make_loader(inputs, labels, classes, device, batch_size, shuffle=False):
    """Return a Loader of float inputs (N, ...) and int64 labels (N,), both on the device.

    They may be arrays, tensors or lists. Inputs of type uint8 are treated as images: they are
    divided by 255, and (N, H, W) becomes (N, 1, H, W). Raises ValueError if there are no inputs, if
    there are more or fewer labels than inputs, or if check_labels() does.
    """
    inputs, labels = torch.as_tensor(inputs), torch.as_tensor(labels)
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise ValueError(f"each input needs a label: {len(inputs)} inputs, {len(labels)} labels")
    check_labels(labels, classes)
    if inputs.dtype == torch.uint8:
        inputs = inputs / 255
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(1)  # (N, 1, H, W)
    return Loader(inputs.float().to(device), labels.long().to(device), batch_size, shuffle)


def make_data(train_pair, val_pair, classes, *, test_pair=None, batch_size=100, device="auto"):
    """Make a Data of pairs (inputs, labels): to train on, shuffled; to validate on; and to test.

    For what a pair may contain, and for the errors, see make_loader(); for the rest, see Data. Also
    raises ValueError if only some of the pairs have inputs of type uint8.
    """
    types = {torch.as_tensor(pair[0]).dtype for pair in (train_pair, val_pair, test_pair) if pair}
    if torch.uint8 in types and len(types) > 1:
        raise ValueError("only uint8 inputs are divided by 255: convert all inputs, or none")
    device = find_device(device)
    # The stars pass inputs and labels as two arguments.
    train_loader = make_loader(*train_pair, classes, device, batch_size, shuffle=True)
    batch_size = max(batch_size, 100)  # Small batches are slow, and only training needs them.
    val_loader = make_loader(*val_pair, classes, device, batch_size)
    test_loader = make_loader(*test_pair, classes, device, batch_size) if test_pair else None
    return Data(train_loader, val_loader, classes, test_loader=test_loader, device=device)


def check_network(model, data):
    """Describe data and network, and look for mistakes, before the first training step.

    Raises ValueError if there is only one class, if a loader has no batch of tensors, if labels are
    not as check_labels() says, or if the network does not return (N, C) for N inputs and C classes.
    Prints a warning if the outputs look like those of softmax or ReLU, or depend on other samples.
    """
    if len(data.classes) < 2:
        raise ValueError(f"a network needs two classes or more to learn, not {data.classes}")
    for name, loader in (("training", data.train_loader), ("validation", data.val_loader)):
        inputs, labels = next(iter(loader), (None, None))
        if not torch.is_tensor(inputs):
            raise ValueError(f"the {name} loader has no batch (inputs, labels) of tensors")
        check_labels(labels, data.classes)
        low, high = inputs.aminmax()
        print(f"Inputs ({name}): {tuple(inputs.shape)} from {low:.4g} to {high:.4g}")
    logits = predict(model, inputs)  # (N, C), for the validation batch
    shape = getattr(logits, "shape", type(logits))
    if shape != (len(inputs), len(data.classes)):
        raise ValueError(
            f"the network returned {shape} for {len(inputs)} inputs, {len(data.classes)} classes"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"Device: {logits.device}, Model: {type(model).__name__} ({count:,} parameters)")
    # Softmax and ReLU give no negative outputs. Those of softmax have the sum 1 for each sample,
    # and the lowest one of ReLU is 0.
    (low, high), sums = logits.aminmax(), logits.sum(dim=1)
    if 0 <= low < high and (low == 0 or (sums - 1).abs().max() < 0.001):
        print("Warning: the outputs look like those of softmax or ReLU, not like logits.")
    # If the batch is filled with copies of its last sample, the logits of this sample should not
    # change. If they change without that, the network draws random numbers: no warning.
    first, again = predict(model, inputs[[-1] * len(inputs)])[0], predict(model, inputs)[-1]
    if again.equal(logits[-1]) and (first - again).abs().max() > 0.001 * logits.abs().max():
        print("Warning: a sample's output depends on the others. Is batch_first=True missing?")


def check_losses(*losses):
    """Raise FloatingPointError if a loss is infinite or NaN."""
    if not math.isfinite(sum(losses)):
        raise FloatingPointError(
            "the loss is not finite; try a smaller learning rate, "
            "or look for values in the data that are not finite"
        )


# ---- tables and augmentation ----


def print_tables(confusion, names):
    """Print precision, recall, F1 and count of each class, then the confusion matrix (C, C).

    Precision: the fraction of the samples predicted as this class that are of this class. Recall:
    the fraction of the samples of this class that are predicted as such. Raises ValueError if the
    number of names is not C.
    """
    if len(names) != len(confusion):
        raise ValueError(f"{len(names)} class names for {len(confusion)} outputs of the network")
    names = list(map(str, names))
    # the numbers of correct, predicted and true samples of each class
    hits, predicted, counts = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    # Without predictions, precision is undefined (0 / 0), and so is recall without samples. Because
    # of clamp, they are printed as 0.
    precision, recall = hits / predicted.clamp(min=1), hits / counts.clamp(min=1)
    # F1 is 2 * precision * recall / (precision + recall), which is the same as this:
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


def random_affine(images, shift, degrees=10, scale=0.1):
    """Apply a different random shift, rotation and scaling to each square image (N, ..., S, S).

    shift (in pixels of the given image, along each axis), degrees and scale (a fraction) are the
    largest changes, in both directions. Outside of an image, its border is repeated. Raises
    ValueError if the images are not square.
    """
    *_, height, size = images.shape
    if height != size:
        raise ValueError(f"augment needs square images, not {height}x{size}")
    pixels = images.reshape(len(images), -1, size, size)  # (N, C, S, S)
    angle, zoom, dx, dy = torch.empty(4, len(images), device=images.device).uniform_(-1, 1)
    angle = angle * math.radians(degrees)  # (N,), as the other three
    zoom = 1 + zoom * scale
    reach = shift * 2 / size  # because affine_grid's positions in an image go from -1 to 1
    # affine_grid maps each position in the output to the position in the input whose value goes
    # there. So, to make an image larger, positions are divided by zoom. (The signs of angle, dx and
    # dy do not matter: positive and negative ones are equally probable.)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack([cos, -sin, dx * reach, sin, cos, dy * reach], dim=1).view(-1, 2, 3)
    # align_corners=False: -1 and 1 are the edges of the image, not the middles of its first and
    # last pixels.
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)  # (N, S, S, 2)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)  # interpolated
    return moved.view(images.shape)


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
    labels = torch.randint(10, (count,))
    # Such a strong distortion makes these digits about as hard to learn as MNIST.
    images = random_affine(torch.stack(pictures)[labels], shift=4, degrees=30, scale=0.4)
    return images.round().byte().squeeze(1), labels


def load_data(
    dataset="mnist", data_dir="data", limit=math.inf, validate=5000, batch_size=100, device="auto"
):
    """Return the Data of a dataset, on the device: its images are (N, 1, 28, 28) in [0, 1].

    dataset: a key of DATASETS. validate: hold out this many training images to validate on, chosen
    at random, but always the same ones. limit: train on this many of the others. Raises UserError
    if the dataset can be neither read nor downloaded, or if no images are left.
    """
    if dataset == "synthetic":
        with torch.random.fork_rng([]):  # Afterwards, the CPU's random numbers go on as before.
            torch.manual_seed(0)  # the same digits in each run
            (images, labels), test = draw_digits(60_000), draw_digits(10_000)
    else:
        (images, labels), test = read_dataset(dataset, data_dir)
    count = min(len(images) - validate, limit)
    if validate < 1 or count < 1:
        raise UserError(f"validate={validate}, limit={limit}: no images to validate or train on")
    # A random order, because MNIST's last training images are easier than the others.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    val, train = order[:validate], order[validate : validate + count]
    print(
        f"Data: {dataset} ({count:,} training, {validate:,} validation, "
        f"{len(test[0]):,} test images)"
    )
    # torchvision's names for MNIST are "0 - zero" and so on.
    classes = [name.partition(" - ")[0] for name in DATASETS[dataset].classes]
    train_pair, val_pair = (images[train], labels[train]), (images[val], labels[val])
    return make_data(
        train_pair, val_pair, classes, test_pair=test, batch_size=batch_size, device=device
    )


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
        part.unlink(missing_ok=True)  # It is left only after an error or Ctrl-C.


def save_weights(model, file):
    """Save the model's state dict, its weights and buffers; raise UserError as write_file does."""
    # Save CPU tensors, so that a plain torch.load works on a machine without a GPU, too.
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    torch.save(weights, content)
    write_file(file, content.getvalue())


def load_weights(model, file):
    """Load a state dict into the model, and return the model in evaluation mode.

    Raises UserError if the file cannot be read, or has the weights of another network. Code that
    the file may contain is never run.
    """
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # for an invalid file, torch may raise almost any exception
        raise UserError(
            f"cannot load {file} ({reason(error)}); use a file that --save wrote "
            f"for the network {type(model).__name__}, with layers of the same size"
        ) from error
    return model.eval()


def write_log(history, file):
    """Write a CSV file with a row for each Epoch; raise UserError as write_file does."""
    text = ",".join(Epoch._fields) + "\n"
    for row in history:
        text += ",".join(f"{value:.6g}" for value in row) + "\n"
    write_file(file, text.encode())


def draw_errors(model, loader, classes, file):
    """Draw up to 100 misclassified images of the loader as a PNG file, most confident first.

    The images are (H, W), (1, H, W) or (3, H, W); each one is rescaled, from its lowest value to
    its highest one. The font has only ASCII letters. Raises UserError as write_file does.
    """
    count, worst = 0, []  # worst: confidence, label, prediction and image of each mistake
    for images, labels in loader:
        confidence, predicted = predict(model, images).softmax(dim=1).cpu().max(dim=1)
        wrong = (predicted != labels.cpu()).nonzero().flatten().tolist()
        count += len(wrong)
        # a clone, because images[i] alone would keep its whole batch in memory
        worst += [(confidence[i], labels[i], predicted[i], images[i].clone()) for i in wrong]
        worst = sorted(worst, key=lambda mistake: mistake[0], reverse=True)[:100]
    sheet = Image.new("RGB", (1200, 140 * math.ceil(max(1, len(worst)) / 10)), "white")
    for i, (confidence, label, predicted, image) in enumerate(worst):
        # A cell has 120x140 pixels: an image of 84x84, three lines of text, and margins.
        x, y = i % 10 * 120 + 18, i // 10 * 140 + 4
        picture = to_pil_image(make_grid(image.cpu(), normalize=True))
        sheet.paste(picture.resize((84, 84), Image.BOX), (x, y))
        names = f"true: {classes[label]!s:.12}\npred: {classes[predicted]!s:.12}"
        text = f"{names}\nconf.: {confidence:.1%}"
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

    Raises ValueError if there is hardly any contrast.
    """
    # Most pixels are paper, so the median is the level of the paper. If it is nearer to the darkest
    # pixel than to the lightest one, the ink is light: invert.
    if grey.median() < (grey.min() + grey.max()) / 2:
        grey = 255 - grey
    # Estimate the paper by the lightest pixel in each cell of a 10x10 grid. In larger cells, shadow
    # would count as ink. A thick stroke that fills a cell would count as paper; therefore, the
    # estimate is at least half of the lightest pixel of the picture.
    paper = F.adaptive_max_pool2d(grey, 10).clamp(min=grey.max() / 2)  # (1, 10, 10)
    paper = F.avg_pool2d(paper, 3, stride=1, padding=1, count_include_pad=False)  # smooth
    ink = F.interpolate(paper[None], grey.shape[1:], mode="bilinear")[0] - grey
    # Most of the paper is slightly darker than the estimate, so it would count as a little ink.
    # Nearly always, at least 40% of the pixels are paper: the 40% with the least ink become 0.
    ink = (ink - ink.quantile(0.4)).clamp(min=0)
    # 30 of 255 is safe: in the 538 pictures, ink.max() was never below 99.
    if ink.max() < 30:
        raise ValueError("no strokes found")
    return ink / ink.max()


def drop_border(ink):
    """Remove the ink that is connected with the border, such as the edge of a desk: (1, H, W).

    If hardly any ink is left, it was the digit: then nothing is removed.
    """
    # Cells of 4x4 pixels: this closes small gaps in the strokes.
    drawn = (F.max_pool2d(ink, 4, ceil_mode=True) > 0.3).float()  # (1, H / 4, W / 4)
    border = drawn.clone()
    border[:, 1:-1, 1:-1] = 0  # Only the outermost cells remain. From them, grow along the ink:
    while True:
        grown = F.max_pool2d(border, 3, stride=1, padding=1) * drawn
        if grown.equal(border):
            break
        border = grown
    inner = F.max_pool2d(drawn - border, 3, stride=1, padding=1)  # and the cells around it
    rest = ink * F.interpolate(inner[None], ink.shape[1:])[0]
    return rest if rest.sum() > 0.05 * ink.sum() else ink


def mnist_form(grey):
    """Convert a picture of a digit, grey levels (1, H, W) in [0, 255], to MNIST's (1, 28, 28).

    The digit may be dark on light or the reverse, of any size, anywhere. As in MNIST, it is scaled,
    and the mean position of its strokes is moved to the middle of pixel (14, 14), near which it is
    in MNIST's training images; see LeCun, Bottou, Bengio and Haffner, "Gradient-based learning
    applied to document recognition" (1998). Raises ValueError if there is hardly any contrast.
    """
    sides = [math.ceil(side * 256 / max(grey.shape)) for side in grey.shape[1:]]
    ink = drop_border(find_ink(resize(grey, sides)))
    drawn = (ink[0] > 0.25).nonzero()  # (pixels, 2): the strokes, without their blurred edge
    longer = 1 + (drawn.amax(dim=0) - drawn.amin(dim=0)).max().item()
    # MNIST's digits have 20 of 28 pixels on their longer side, which include half a thick stroke at
    # each end. Most people's strokes are thinner. So that their middles are where MNIST's are, 19.
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
    level, alpha = pil_to_tensor(image.convert("LA")).float().split(1)  # each (1, H, W)
    # What is transparent becomes white. But if nothing on white is darker than 225, the
    # strokes are white, too; then, what is transparent becomes black.
    on_black = level * alpha / 255
    on_white = on_black + 255 - alpha
    return mnist_form(on_white if on_white.min() < 225 else on_black)


def predict_pictures(model, files, classes):
    """Print the predicted digit in each picture, and the network's confidence.

    Raises UserError at the end if a picture cannot be read.
    """
    failures = []
    for file in files:
        try:
            image = read_picture(file)
        except Exception as error:  # for an invalid picture, Pillow may raise almost any exception
            failures.append(f"cannot read a digit from {file}: {reason(error)}")
        else:
            probabilities = predict(model, image[None])[0].softmax(dim=0)  # (C,)
            confidence, digit = probabilities.max(dim=0)
            print(f"{file}: {classes[digit]} ({confidence:.1%})")
    if failures:
        raise UserError(f"{'; '.join(failures)}; use JPEG or PNG files of one digit on plain paper")


# ---- command line ----


def number(low, high=math.inf, kind=int):
    """Return an argparse type: numbers from `low` to `high`, of this kind: int or float."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


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
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a plain file")
        # a trial, which removes its file again
        with tempfile.NamedTemporaryFile(prefix=file.name, dir=file.parent):
            return name
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write {name}: {reason(error)}; choose a file in a folder that you may write to"
        ) from error


def make_parser(description):
    """Return an argparse parser with the options that both scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("training").add_argument  # add(...) adds to this group
    add("--epochs", type=number(0), default=10, help="default: %(default)s; 0: only test")
    add("--batch-size", type=number(1), default=100, help="default: %(default)s")
    add(
        "--lr",
        type=number(0, kind=float),
        help="default: 0.001; with --one-cycle 0.01 (CNN) or 0.005 (LSTM)",
    )
    add("--one-cycle", action="store_true", help="raise the learning rate to --lr, then lower it")
    add("--augment", action="store_true", help="rotate, scale and shift training images at random")
    add(
        "--seed",
        type=number(0, 10**15),
        default=0,
        help="default: %(default)s; decides all random numbers but the split and synthetic digits",
    )
    add("--device", type=working_device, default="auto", help="cpu, cuda, cuda:1, mps, ... or auto")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="default: mnist; offline: synthetic")
    add("--data-dir", default="data", help="dataset folder (default: %(default)s)")
    add("--limit", type=number(1), default=math.inf, help="train on LIMIT images only")
    add(
        "--validate",
        type=number(1),
        default=5000,
        help="hold out VALIDATE training images, to validate on (default: %(default)s)",
    )

    add = parser.add_argument_group("results").add_argument
    add("--log", type=output_file, help="CSV file for the results of each epoch")
    add("--save", type=output_file, help="file for the weights, written after each epoch")
    add("--load", help="start from weights that --save wrote; to train further, change --seed")
    add("--predict", nargs="+", metavar="IMAGE", help="with --load: only classify pictures")
    add("--errors", type=output_file, help="PNG file: draw misclassified test images")
    return parser


def parse_args(parser, argv):
    """Parse `argv`, a list, and check the options."""
    args = parser.parse_args(argv)
    files = [os.path.abspath(file) for file in (args.save, args.log, args.errors) if file]
    if args.predict and not args.load:
        parser.error("argument --predict: needs trained weights; add --load FILE")
    if args.predict and DATASETS[args.dataset] is not datasets.MNIST:
        parser.error(f"argument --predict: reads only digits, and {args.dataset} has none")
    if args.predict and files:
        parser.error("argument --predict: only classifies, without --save, --log and --errors")
    if args.epochs == 0 and (args.save or args.log):
        parser.error("argument --epochs: must be at least 1 with --save or --log")
    if len(set(files)) < len(files):
        parser.error("arguments --save, --log and --errors: choose a different file for each")
    return args


def start_network(network, args):
    """Return a function that creates the network; with --load, the network has saved weights."""
    if not args.load:
        return network
    model = load_weights(network(), args.load).to(args.device)
    return lambda: copy.deepcopy(model)


def read_data(args):
    """Return the Data that the options name."""
    return load_data(
        args.dataset, args.data_dir, args.limit, args.validate, args.batch_size, args.device
    )


def make_saver(args):
    """Return an after_epoch for train(), which writes the files of --save and --log."""

    def after_epoch(model, history):
        if args.save:
            save_weights(model, args.save)
        if args.log:
            write_log(history, args.log)

    return after_epoch


def report(evaluation, model, data, args):
    """Print the Evaluation of the test; with --errors, draw the misclassified images."""
    if args.epochs:
        print("Training finished.")
    print(f"Test loss: {evaluation.loss:.4f}, Test accuracy: {evaluation.accuracy:.2%}")
    print_tables(evaluation.confusion, data.classes)
    if args.errors:
        draw_errors(model, data.test_loader, data.classes, args.errors)


def run(main):
    """Run main() as a program, and return its result.

    An error that the user can fix is printed as one line, with exit status 1; Ctrl-C gives 130.
    """
    # A console with a prompt (ps1), such as a notebook's, has arguments of its own in sys.argv,
    # unless it runs the file of main(), as %run does.
    is_console = (
        hasattr(sys, "ps1") and Path(sys.argv[0]).name != Path(main.__code__.co_filename).name
    )
    try:
        result = main([] if is_console else sys.argv[1:])
        print(end="", flush=True)  # so that a closed pipe fails here, not at the exit
        return result
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # The program that reads our output, such as `head`, has ended.
        os._exit(1)  # sys.exit would try to print the rest.
