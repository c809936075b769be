"""Tests of the scripts, on the CPU and on the accelerator if it works: python -m pytest

They need no internet access. A test on the real MNIST reads it from ./data, and is skipped if it
is not there.
"""

import argparse
import contextlib
import copy
import inspect
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from pytest import approx, raises
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

import cnn_mnist
import common
import rnn_mnist
from cnn_mnist import CNN, train
from common import Data, UserError, evaluate, make_data
from rnn_mnist import RNN

parametrize = pytest.mark.parametrize
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")
HERE = Path(__file__).resolve().parent
RAW = Path("data/MNIST/raw")
DEVICES = ["cpu"]
with contextlib.suppress(argparse.ArgumentTypeError):  # The accelerator does not work.
    DEVICES = sorted({"cpu", common.working_device("auto").type})

# One thread, here and in subprocesses: on a busy machine, several would wait for each other.
torch.set_num_threads(1)
# With PYTHONUNBUFFERED, as in many containers, a missing flush would not be seen.
os.environ.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="")

# Images and labels of synthetic digits, for three training steps and two batches of evaluation.
torch.manual_seed(1)
TRAIN, VAL = common.draw_digits(250), common.draw_digits(130)
VAL_INPUTS = VAL[0][:, None] / 255  # (130, 1, 28, 28)


# ---- helpers ----


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in a new, empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[cnn_mnist, rnn_mnist])
def script(request):
    return request.param


@pytest.fixture
def network(script):
    return CNN if script is cnn_mnist else RNN


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def digits(device="cpu", batch_size=100):
    return make_data(TRAIN, VAL, "0123456789", batch_size=batch_size, device=device)


class Own(nn.Module):
    """A network with BatchNorm and dropout; `seen` gathers its mode and inputs at each call."""

    def __init__(self, inputs=784, outputs=10, seen=None):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)
        self.seen = [] if seen is None else seen

    def forward(self, x):
        self.seen.append((self.training, x))
        return self.fc(F.dropout(self.norm(x.flatten(1)), training=self.training))


def write_idx(file, values):
    """Write uint8 values in MNIST's format: 2048 + number of dimensions, sizes, values."""
    header = np.array([2048 + values.dim(), *values.shape], ">i4")  # big-endian
    file.write_bytes(header.tobytes() + values.numpy().tobytes())


@pytest.fixture
def small_mnist(empty_folder):
    """TRAIN and VAL as MNIST's training and test images in ./data."""
    RAW.mkdir(parents=True)
    for split, (images, labels) in (("train", TRAIN), ("t10k", VAL)):
        write_idx(RAW / f"{split}-images-idx3-ubyte", images)
        write_idx(RAW / f"{split}-labels-idx1-ubyte", labels.byte())


Run = namedtuple("Run", "status model evaluation output errors")


@pytest.fixture
def command(small_mnist, capsys):
    """A function that runs a script's command line; the last one of repeated options counts.

    If its status is a text, Python would print it, and exit with status 1.
    """

    def command(script, options=""):
        argv = ["--device", "cpu", "--validate", "50", *options.split()]
        try:
            result = 0, *common.run(lambda _: script.main(argv))  # `_`: pytest's own arguments
        except SystemExit as ended:
            result = ended.code, None, None
        return Run(*result, *capsys.readouterr())

    return command


@pytest.fixture
def file(empty_folder):
    """A file of an earlier run."""
    file = Path("results.png")
    file.write_text("of a former run")
    return file


def start(script, options):
    """Start a script in a subprocess, which is killed after five minutes."""
    command = [sys.executable, script.__file__, "--device", "cpu", "--validate", "49"]
    process = subprocess.Popen([*command, *options.split()], text=True, stdout=PIPE, stderr=PIPE)
    timer = threading.Timer(300, process.kill)
    timer.daemon = True
    timer.start()
    return process


def assert_same_weights(model, other):
    """All weights and buffers are the same, bit for bit."""
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


# ---- the bugs of the tutorial, in the order of the README ----


def test_bug_softmax_before_cross_entropy_loss(script, network):
    """If softmax is applied twice, the loss of ten classes stays above ln(e + 9) - 1 = 1.46."""
    data = make_data([tensor[:10] for tensor in TRAIN], VAL, range(10), device="cpu")
    _, history = script.train(network, data, epochs=120, lr=0.003)
    assert history[-1].train_loss < 0.5


def test_bug_classifier_input_size():
    """The tutorial's layers fit together if the convolutions keep the size of the image."""
    cnn, images = CNN(num_classes=3), torch.rand(2, 1, 28, 28)
    x = F.max_pool2d(cnn.conv1(images).relu(), 2)
    x = F.max_pool2d(cnn.conv2(x).relu(), 2)
    assert cnn.fc.weight.shape == (3, 32 * 7 * 7)
    assert_close(cnn(images.flatten(1)), cnn.fc(x.flatten(1)))


def test_bug_lstm_without_batch_first():
    """The output comes from the last layer's state after the last row of each image."""
    model, images = RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(images.squeeze(1))  # (2, 3, 128)
    assert_close(model(images), model.fc(hidden[-1]))
    assert RNN(8, 1, 5, 4)(torch.rand(3, 1, 5)).shape == (3, 4)  # sequences of another size


OUTPUT = r"""Data: mnist \(201 training, 49 validation, 130 test images\)
Inputs \(training\): \(2, 1, 28, 28\) from 0 to 1
Inputs \(validation\): \(49, 1, 28, 28\) from 0 to 1
Device: cpu, Model: (CNN \(20,490|RNN \(214,282) parameters\)
Epoch \[1/2\], Step \[100/101\], Loss: #
Epoch \[1/2\], Step \[101/101\], Loss: #
Epoch \[1/2\], Training loss: #, Validation loss: #, Validation accuracy: %, Time: \d+\.\d\d s
Epoch \[2/2\], Step \[100/101\], Loss: #
Epoch \[2/2\], Step \[101/101\], Loss: #
Epoch \[2/2\], Training loss: #, Validation loss: #, Validation accuracy: %, Time: \d+\.\d\d s
Training finished.
Test loss: #, Test accuracy: %
Class        Precision    Recall        F1     Count
0 """.replace("#", r"\d\.\d{4}").replace("%", r"\d+\.\d\d%")


def test_bug_undefined_names(script, small_mnist):
    """The script runs from start to end, and prints its progress."""
    process = start(script, "--epochs 2 --batch-size 2")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert re.match(OUTPUT, output)


def test_bug_test_set_never_evaluated(script, command):
    """The script tests the trained network on the test images."""
    run = command(script, "--epochs 2 --lr 0.003")
    loss = F.cross_entropy(run.model(VAL_INPUTS), VAL[1])
    assert run.evaluation.loss == approx(loss.item(), abs=1e-3)


def test_bug_steps_counted_without_the_last_batch(capsys):
    """250 images are three steps of 100, because the last, incomplete batch is a step, too."""
    train(CNN, digits(), epochs=1)
    assert re.findall(r"Step \[(.*)\]", capsys.readouterr().out) == ["3/3"]


# ---- train ----


def test_both_scripts_have_the_same_loop_but_for_two_numbers():
    cnn, rnn = (inspect.getsource(script.train) for script in (cnn_mnist, rnn_mnist))
    for old, new in (("0.01", "0.005"), ("shift=1", "shift=2")):
        assert old in cnn
        cnn = cnn.replace(old, new)
    assert cnn == rnn


def test_smoke_one_batch(script, network, device):
    data = digits(batch_size=250)  # batches on the CPU, network on `device`
    data.device = torch.device(device)
    criterion = nn.CrossEntropyLoss(weight=torch.ones(10, device=device))
    before, after = (script.train(network, data, epochs=n, criterion=criterion)[0] for n in (0, 1))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert not torch.equal(old, new)


OWN_CHOICES = {
    "optimizer": partial(torch.optim.SGD, momentum=0.9),
    "criterion": nn.CrossEntropyLoss(weight=torch.arange(1.0, 11), label_smoothing=0.1),
    "lr": 0.003,
}


@parametrize("options", [{}, OWN_CHOICES])
@parametrize("network", [CNN, RNN, Own])
def test_training_is_that_of_a_plain_loop(network, options, capsys):
    """The order of the samples depends only on seed and epoch. Optimizer and loss can be chosen."""
    train(network, digits(), epochs=2, seed=3, **options)
    printed = re.findall(r"[Ll]oss: ([\d.]*)", capsys.readouterr().out)
    loader, losses = digits().train_loader, []
    torch.manual_seed(3)
    model = network()
    lr, criterion = options.get("lr", 0.001), options.get("criterion", F.cross_entropy)
    optimizer = options.get("optimizer", torch.optim.Adam)(model.parameters(), lr=lr)
    for epoch in (1, 2):
        torch.manual_seed(3000 + epoch)
        total = 0
        for batch in torch.randperm(250).split(100):
            loss = criterion(model.train()(loader.inputs[batch]), loader.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        validation = criterion(model.eval()(VAL_INPUTS), VAL[1])
        losses += [loss.item(), total / 250, validation.item()]
    assert list(map(float, printed)) == approx(losses, abs=1e-3)


@parametrize("options", [{}, {"one_cycle": True, "augment": True}])
@parametrize("network", [CNN, RNN, Own])
def test_the_same_call_gives_the_same_weights(network, device, options):
    """Also if other random numbers are drawn before it, or after each epoch."""
    data = digits(device)

    def measure(model, history):
        evaluate(model, data.train_loader)  # The loader shuffles: it draws random numbers.

    model, _ = train(network, data, epochs=2, **options)  # The next call starts from another state.
    assert_same_weights(model, train(network, data, epochs=2, after_epoch=measure, **options)[0])


def test_the_command_line_and_train_give_the_same_weights(script, network, command):
    options = f"--limit 110 --batch-size 64 --epochs 2 --one-cycle --augment --seed {10**15}"
    trained = command(script, f"{options} --lr 0.002").model
    data = common.load_data(limit=110, validate=50, batch_size=64, device="cpu")
    options = {"lr": 0.002, "one_cycle": True, "augment": True, "seed": 10**15}
    assert_same_weights(trained, script.train(network, data, epochs=2, **options)[0])
    plain, _ = script.train(network, common.load_data(validate=50, device="cpu"), epochs=1)
    assert_same_weights(command(script, "--epochs 1").model, plain)


def test_a_network_is_never_trained_twice():
    model = Own()
    for network in (model, lambda: model):
        with raises(TypeError, match="creates a new network: CNN, not CNN()"):
            train(network, digits())
    train(lambda: copy.deepcopy(model), digits(), epochs=1)  # trains a copy further


def test_an_optimizer_without_lr_is_refused_before_anything_is_created():
    with raises(ValueError, match="pass a learning rate"):
        train(pytest.fail, digits(), optimizer=torch.optim.SGD)


def test_each_epoch_trains_validates_and_calls_after_epoch(capsys, monkeypatch):
    """A true value ends the training, which is printed. The test images are not touched."""
    data, seen = digits(batch_size=50), []
    data.test_loader = map(pytest.fail, ["touched"])
    monkeypatch.setattr(time, "perf_counter", lambda: len(seen))  # Each batch takes a second.

    def after_epoch(model, history):
        seen.append((model.training, history[:]))
        return len(history) // 2

    _, history = train(lambda: Own(seen=seen), data, epochs=5, after_epoch=after_epoch)
    epoch = [(True, 50)] * 5 + [(False, 100), (False, 30)]  # Evaluation takes at least 100 at once.
    expected = [*epoch, (False, 1), *epoch, (False, 2)]
    assert [(training, len(batch)) for training, batch in seen[-len(expected) :]] == expected
    assert [(row.epoch, row.seconds) for row in history] == [(1, 5), (2, 5)]  # without evaluation
    assert capsys.readouterr().out.endswith("\nafter_epoch returned a true value: training ends.\n")


@parametrize(("lr", "peak"), [(None, 0.01), (0.002, 0.002)])
def test_one_cycle_peaks_after_30_percent_of_the_steps(lr, peak):
    steps = []
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: steps.append(dict(adam.param_groups[0]))  # a copy
    )
    train(Own, digits(batch_size=25), epochs=1, lr=lr, one_cycle=True)  # 10 steps; peak: the third
    hook.remove()
    at = [steps[0], steps[2], steps[9]]
    assert [step["lr"] for step in at] == approx([peak / 25, peak, peak / 250_000])
    assert [step["betas"][0] for step in at] == approx([0.95, 0.85, 0.95])


def test_augment_moves_each_training_image_and_no_other():
    plain, moved = (train(Own, digits(), epochs=1, augment=on)[0].seen for on in (False, True))
    for (training, images), (_, others) in zip(plain, moved, strict=True):
        differs = (images != others).flatten(1).any(dim=1)
        assert differs.all() if training else not differs.any()


def test_random_affine_works_in_pixels(device):
    """It rotates, scales and shifts by up to 10 degrees, 10% and 2 pixels, and does not shear.

    Each pixel of these images holds its own position, so the result says where it came from.
    Positions are written as complex numbers x + yi: multiplying by i rotates by 90 degrees.
    """
    x = torch.arange(1.0, 21).expand(5000, 1, 20, 20)
    moved = common.random_affine(torch.cat([x, x.mT], dim=1).to(device), shift=2).cpu()
    assert moved.aminmax() == approx((1, 20), abs=0.001)  # What is outside repeats the border.
    position = torch.complex(*moved.unbind(dim=1))
    here, right, below = position[:, 9, 9], position[:, 9, 10], position[:, 10, 9]
    assert_close(below - here, (right - here) * 1j, atol=1e-4, rtol=0)
    assert (right - here).angle().rad2deg().aminmax() == approx((-10, 10), abs=0.1)
    assert (right - here).abs().aminmax() == approx((1 / 1.1, 1 / 0.9), abs=0.001)
    shift = torch.view_as_real(right + below) / 2 - 10.5  # of the centre of the image
    assert shift.abs().amax(dim=0).tolist() == approx([2, 2], abs=0.01)
    assert shift.diff().max() > 3  # not only along the diagonal
    with raises(ValueError, match="square images, not 14x28"):
        common.random_affine(torch.ones(2, 1, 14, 28), shift=2)


class Calls(TorchDispatchMode, list):
    """While it is active, it gathers the names of torch's operations."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_step_neither_waits_for_the_device_nor_copies(device):
    """One step and two steps of training read equally many numbers, and copy as often."""
    counts = []
    for batch_size in (250, 130):  # Each time, only the last step is printed.
        data = digits(device, batch_size)
        with Calls() as calls:
            train(Own, data, epochs=1, one_cycle=True, augment=True)
        # item(), and conditions on tensors, read a number; to() copies if it has to.
        counts.append([calls.count(name) for name in ("_local_scalar_dense", "_to_copy")])
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


# ---- what is checked before the first step ----


class Noise(nn.Module):
    def forward(self, x):
        return F.dropout(x)  # in evaluation mode, too


class Spread(nn.Module):
    def forward(self, x):
        return x + x.std(dim=0).sum()


def chain(*layers):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), *layers)


def lstm_of_the_tutorial():
    model = RNN()
    model.lstm.batch_first = False
    return model


LIKE_SOFTMAX = "Warning: the outputs look like those of softmax or ReLU, not like logits.\n"
DEPENDS = "Warning: a sample's output depends on the others. Is batch_first=True missing?\n"
CHECKED = {
    "softmax": (chain(nn.Softmax(1)), LIKE_SOFTMAX),
    "ReLU": (chain(nn.ReLU()), LIKE_SOFTMAX),
    "the tutorial's LSTM": (lstm_of_the_tutorial, DEPENDS),
    "other samples only raise the outputs": (chain(Spread()), DEPENDS),
    "CNN": (CNN, ""),
    "RNN": (RNN, ""),
    "BatchNorm and dropout": (Own, ""),
    "log-softmax": (chain(nn.LogSoftmax(1)), ""),
    "positive outputs": (chain(nn.Softplus()), ""),
    "dropout in evaluation mode": (chain(Noise()), ""),
    "outputs that are all 0.1": (chain(nn.Threshold(1e9, 0.1)), ""),  # 0.1 for all below 1e9
    "a fixed batch size": (chain(nn.Unflatten(0, (10, 10)), nn.Flatten(0, 1)), ""),
}


@parametrize("name", CHECKED)
def test_suspicious_outputs_are_warned_of_and_no_others(name, device, capsys):
    """At each call of train(), whatever the loss is."""
    network, warning = CHECKED[name]
    data = make_data(TRAIN, [part[:100] for part in TRAIN], range(10), device=device)
    data.val_loader.inputs[:, :, -8:] = 0  # as the bottom rows of MNIST are
    for criterion in (F.cross_entropy, F.nll_loss):
        train(network, data, epochs=0, criterion=criterion)
        assert "".join(re.findall(r"Warning.*\n", capsys.readouterr().out)) == warning


SAMPLES = (torch.rand(20, 3), torch.arange(20) % 2)


@parametrize(
    ("loader", "classes", "outputs", "says"),
    [
        ([SAMPLES], "a", 1, r"two classes or more to learn, not \['a'\]"),
        ([SAMPLES], "ab", 3, r"returned torch.Size\(\[20, 3\]\) for 20 inputs, 2 classes"),
        ([], "ab", 2, "the validation loader has no batch"),
        ([(["a text"], SAMPLES[1])], "ab", 2, "the validation loader has no batch .* of tensors"),
        ([(SAMPLES[0], SAMPLES[1] + 1)], "ab", 2, "from 0 to 1, .* from 1 to 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(loader, classes, outputs, says):
    data = Data([SAMPLES], loader, classes, device="cpu")
    with raises(ValueError, match=says):
        train(lambda: nn.Linear(3, outputs), data, optimizer=pytest.fail, lr=1)


# ---- data ----


WHITE = np.full((2, 3, 8, 8), 255, np.uint8)


@parametrize(
    ("inputs", "shape"),
    [
        (WHITE, (2, 3, 8, 8)),
        (WHITE[:, 0], (2, 1, 8, 8)),
        (WHITE[:, 0] / 255, (2, 8, 8)),
        ([[1, 1]] * 2, (2, 2)),
    ],
)
@parametrize("labels", [np.array([1.0, 0]), [True, False]])
def test_make_data_takes_arrays_and_lists(inputs, labels, shape, device):
    """It makes float32 inputs and int64 labels of them, on the device."""
    pair = inputs, labels
    data = make_data(pair, pair, "ab", test_pair=pair, device=device)
    for loader in (data.train_loader, data.val_loader, data.test_loader):
        assert_close(loader.inputs, torch.ones(shape, device=device))
        assert_close(loader.labels, torch.tensor([1, 0], device=device))
    assert data.device.type == device
    assert not data.val_loader.shuffle


@parametrize(
    ("inputs", "labels", "says"),
    [
        ([[5.0]] * 5, [0, 1, 0], "5 inputs, 3 labels"),
        ([], [], "0 inputs, 0 labels"),
        *(
            ([[5.0]] * 2, labels, r"labels must be whole numbers \(N,\) from 0 to 1")
            for labels in ([0.9, 1], [1, 2], [0, -100], [[0], [1]], [[1, 0], [0, 1]])
        ),
        (torch.ones(2, 1).byte(), [0, 1], "only uint8 inputs are divided by 255"),
    ],
)
def test_make_data_refuses_what_does_not_fit(inputs, labels, says):
    good = [[5]] * 2, [0, 1]
    with raises(ValueError, match=says):
        make_data(good, good, "ab", test_pair=(inputs, labels), device="cpu")


def test_own_loaders_and_lists_of_batches_give_repeatable_results():
    """Colour images, with labels of type uint8."""
    samples = TensorDataset(torch.randn(60, 3, 8, 8), torch.arange(60).byte() % 20)
    loader = DataLoader(samples, 8, shuffle=True)
    data = Data(loader, list(loader), range(20), device="cpu")
    model, same = (train(lambda: Own(192, 20), data, epochs=2)[0] for _ in range(2))
    assert_same_weights(model, same)
    assert evaluate(model, loader).confusion.sum(dim=1).tolist() == [3] * 20  # all labels


def test_a_network_that_changes_its_input_does_not_change_the_data():
    loader = digits().val_loader
    next(iter(loader))[0].zero_()
    assert loader.inputs[:100].any()


def test_validation_images_are_random_always_the_same_and_never_trained_on(small_mnist):
    torch.manual_seed(5)  # does not matter
    data = common.load_data(validate=100, limit=70, batch_size=30, device="cpu")
    order = torch.randperm(250, generator=torch.Generator().manual_seed(0))
    val, rest = ([part[indices] for part in TRAIN] for indices in (order[:100], order[100:170]))
    same = make_data(rest, val, "0123456789", test_pair=VAL, batch_size=30, device="cpu")
    for name in ("train_loader", "val_loader", "test_loader"):
        assert_close(vars(getattr(data, name)), vars(getattr(same, name)))
    with raises(UserError, match="no images to validate or train on"):
        common.load_data(validate=0)


@parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_each_dataset_has_its_folder_and_classes(name, folder, small_mnist, monkeypatch):
    """By default, on the CPU if there is no accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    Path("data/MNIST").rename(f"data/{folder}")
    data = common.load_data(name, validate=50)
    assert (data.classes, data.device.type) == (getattr(datasets, folder).classes, "cpu")


def test_synthetic_digits_are_all_different_and_the_same_in_each_run():
    state = torch.get_rng_state()
    data = common.load_data("synthetic", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)  # still the same
    torch.rand(3)
    again = common.load_data("synthetic", device="cpu")
    assert torch.equal(data.val_loader.inputs, again.val_loader.inputs)
    parts = [loader.inputs for loader in (data.train_loader, data.val_loader, data.test_loader)]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 70_000


MNIST = HERE / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST.is_file(), reason="MNIST is not in ./data")
def test_real_mnist_is_learned(script, network):
    data = common.load_data(data_dir=HERE / "data", limit=10_000, device=DEVICES[-1])
    _, history = script.train(network, data, epochs=1, one_cycle=True)
    assert history[0].val_accuracy > 0.8


# ---- evaluate and report ----


def test_evaluate_computes_each_result(device):
    """The network returns its inputs, in evaluation mode. The third class has no samples."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout()).to(device)
    nn.init.eye_(model[0].weight)
    logits, labels = 3 * torch.eye(3)[[0, 1, 0, 1]], torch.tensor([0, 0, 0, 1])
    loader = DataLoader(TensorDataset(logits, labels.byte()), 3)
    evaluation = evaluate(model, loader)
    assert evaluation.loss == approx(0.84493, abs=1e-4)  # ln(e^3 + 2) - 3 * 3 / 4
    assert evaluation.accuracy == 0.75
    assert evaluation.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert_close(evaluation.logits, logits)
    assert_close(evaluation.labels, labels)
    assert model.training  # as before
    assert not evaluation.logits.requires_grad
    assert not evaluation.logits.is_inference()  # so that people may compute gradients with it


THREE_CLASSES = """\
Class        Precision    Recall        F1     Count
cat             0.8889    0.8000    0.8421        10
dog             0.8182    0.9000    0.8571        10
3               0.0000    0.0000    0.0000         0
Confusion matrix (rows: true classes, columns: predicted classes):
                          cat              dog                3
cat                         8                2                0
dog                         1                9                0
3                           0                0                0
"""  # of 10 cats, 2 are predicted as dogs; F1 of cats: 16/19

FASHION = "              T-shi Trous Pullo Dress  Coat Sanda Shirt Sneak   Bag Ankle"


def test_tables_of_three_classes(capsys):
    confusion = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])  # no sample of the third class
    common.print_tables(confusion, ["cat", "dog", 3])
    assert capsys.readouterr().out == THREE_CLASSES
    with raises(ValueError, match="^2 class names for 3 outputs of the network$"):
        common.print_tables(confusion, "ab")


def test_tables_of_long_names_and_large_counts(capsys):
    common.print_tables(torch.full((20, 20), 10**6), datasets.FashionMNIST.classes * 2)
    output = capsys.readouterr().out
    assert f"\n{FASHION} " in output
    assert output.endswith(" 1000000 1000000\n")


def test_errors_in_colour_most_confident_first_with_names_that_fit(device):
    """Standardized images of one pixel, whose three colours are also the logits of three classes.

    The loader shuffles them, and reuses the memory of its batches, as some loaders do.
    """
    green = torch.rand(300, device=device)
    logits = torch.stack([green * 0, green, green * 0 + 1], dim=1) * 4 - 2
    loader = common.Loader(logits.view(-1, 3, 1, 1), green.long(), 50, shuffle=True)
    batch = torch.empty(50, 3, 1, 1, device=device)
    reused = ((batch.copy_(images), labels) for images, labels in loader)
    common.draw_errors(nn.Flatten(), reused, [8, "b", "WALKING_UPSTAIRS"], "e.png")
    sheet = pil_to_tensor(Image.open("e.png"))
    worst = logits[green.argsort()[:100]].cpu()  # More green makes the third class less probable.
    drawn = sheet[:, 46::140, 60::120].flatten(1).T / 255  # the middle of each image
    assert_close(drawn, (worst + 2) / 4, atol=0.01, rtol=0)
    text = f"true: 8\npred: WALKING_UPST\nconf.: {worst[0].softmax(dim=0)[2]:.1%}"
    expected = Image.new("RGB", (120, 50), "white")
    ImageDraw.Draw(expected).text((18, 0), text, "black", font_size=13, spacing=2)
    assert torch.equal(sheet[:, 90:140, :120], pil_to_tensor(expected))


def test_a_sheet_without_mistakes(capsys):
    images = torch.eye(2).view(2, 1, 1, 2)  # the logits
    common.draw_errors(nn.Flatten(), [(images, torch.arange(2))], "ab", "e.png")
    assert Image.open("e.png").size == (1200, 140)
    assert capsys.readouterr().out == "e.png shows 0 of 0 mistakes.\n"


def test_report_and_log_agree_with_the_results(script, command, file, capsys):
    Path("log.csv").write_text("of a former run")
    run = command(script, f"--epochs 2 --lr 0.003 --log log.csv --errors {file}")
    common.print_tables(run.evaluation.confusion, "0123456789")
    wrong = round(130 * (1 - run.evaluation.accuracy))
    shown = min(wrong, 100)
    last = f"results.png shows {shown} of {wrong} mistakes.\n"
    assert run.output.endswith(capsys.readouterr().out + last)
    assert Image.open(file).height == math.ceil(shown / 10) * 140
    log = np.genfromtxt("log.csv", delimiter=",", names=True)
    assert log.dtype.names == ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds")
    assert log["epoch"].tolist() == [1, 2]
    _, train_loss, val_loss, accuracy, _ = log[1]
    assert f"Training loss: {train_loss:.4f}, Validation loss: {val_loss:.4f}" in run.output
    assert f"Validation accuracy: {accuracy:.2%}, " in run.output


def test_zero_epochs_only_test(script, command):
    run = command(script, "--epochs 0 --one-cycle")
    score = f"Test loss: {run.evaluation.loss:.4f}, Test accuracy: {run.evaluation.accuracy:.2%}"
    assert run.output.splitlines()[4] == score
    assert not run.model.training


# ---- files ----


CNN_WEIGHTS = CNN().state_dict()


def test_saved_weights_are_a_plain_state_dict_on_the_cpu(device, command, file):
    trained = command(cnn_mnist, f"--device {device} --epochs 2 --save {file}").model
    weights = torch.load(file)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert all(tensor.is_contiguous() for tensor in weights.values())  # in the ordinary format
    loaded = command(cnn_mnist, f"--device {device} --epochs 1 --lr 0 --load {file}").model
    assert_same_weights(trained, loaded)


def test_saved_weights_include_the_buffers_of_batchnorm(file):
    model, _ = train(Own, digits(), epochs=1)
    common.save_weights(model, file)
    loaded = common.load_weights(Own(), file)
    assert_same_weights(model, loaded)
    assert not loaded.training
    with raises(UserError, match="cannot write missing/w.pt: .*; choose another path"):
        common.save_weights(model, "missing/w.pt")


def test_weights_that_somebody_saved_on_a_gpu_are_loaded(file):
    torch.save(CNN_WEIGHTS, file)
    file.write_bytes(file.read_bytes().replace(b"cpu", b"mps"))  # the device of the weights
    assert common.load_weights(CNN(), file)


class Harmful:
    """Makes the folder `trace` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


OTHER_WEIGHTS = {
    "harmful": {"weights": Harmful()},
    "checkpoint": {"weights": CNN_WEIGHTS},
    "list": list(CNN_WEIGHTS.values()),
    "size": {**RNN().state_dict(), "fc.weight": torch.zeros(10, 16)},
}


@parametrize("content", OTHER_WEIGHTS)
def test_other_weights_are_refused_and_run_no_code(content, file, monkeypatch):
    monkeypatch.setenv(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"
    )  # torch.load's own default runs code.
    torch.save(OTHER_WEIGHTS[content], file)
    says = r"cannot load results.png \(.*\); use a file that --save wrote for the network RNN, "
    with raises(UserError, match=says):
        common.load_weights(RNN(), file)
    assert not Path("trace").exists()


@parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (OSError("full"), "error: cannot write results.png: full; choose another path"),
    ],
)
def test_an_interrupt_or_a_full_disk_keeps_the_file(error, status, command, file, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    assert command(cnn_mnist, f"--save {file} --log log.csv").status == status
    assert file.read_text() == "of a former run"
    assert sorted(os.listdir()) == ["data", file.name]


# ---- command line ----


def test_hidden_and_layers_shape_the_lstm(command):
    lstm = command(rnn_mnist, "--epochs 0 --hidden 8 --layers 3").model.lstm
    assert (lstm.hidden_size, lstm.num_layers) == (8, 3)


@pytest.fixture
def places(small_mnist):
    """Folders and files that cannot be used."""
    os.mkdir("folder")
    shutil.copytree("data", "damaged")
    Path("damaged/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"damaged")
    Path("text").write_text("seven is a digit")
    with_grain(Image.new("L", (300, 200), 240), 4).save("blank.png")
    torch.save(CNN_WEIGHTS, "w.pt")


def read_files():
    return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}


WRONG_OPTIONS = f"""\
--epochs x -> argument --epochs: invalid number value: 'x'
--epochs -1 -> argument --epochs: -1 is not between 0 and inf
--batch-size 0 -> argument --batch-size: 0 is not between 1 and inf
--limit 0 -> argument --limit: 0 is not between 1 and inf
--validate 0 -> argument --validate: 0 is not between 1 and inf
--hidden 0 -> argument --hidden: 0 is not between 1 and inf
--layers 0 -> argument --layers: 0 is not between 1 and inf
--lr -1 -> argument --lr: -1 is not between 0 and inf
--lr nan -> argument --lr: nan is not between 0 and inf
--seed {10**15 + 1} -> argument --seed: {10**15 + 1} is not between 0 and {10**15}
--device gpu -> argument --device: gpu cannot be used:
--device meta -> argument --device: meta cannot be used:
--epochs 0 --save a -> argument --epochs: must be at least 1 with --save or --log
--epochs 0 --log a -> argument --epochs: must be at least 1 with --save or --log
--predict 7.png -> argument --predict: needs trained weights; add --load FILE
--predict 7.png --load w.pt --dataset kmnist -> argument --predict: reads only digits
--predict 7.png --load w.pt --errors a -> argument --predict: only classifies
--predict 7.png --load w.pt --log a -> argument --predict: only classifies
--save ./a --log a -> arguments --save, --log and --errors: choose a different file for each
--save folder -> argument --save: cannot write folder: it is not a plain file; choose a file in a
--log gone/a -> argument --log: cannot write gone/a: [Errno 2] No such file
--errors text/a -> argument --errors: cannot write text/a: [Errno
--save {os.devnull} -> argument --save: cannot write {os.devnull}: it is not a plain file
--save {"a" * 252} -> argument --save: cannot write {"a" * 252}: [Errno
"""


@parametrize("line", WRONG_OPTIONS.splitlines())
def test_a_wrong_option_is_named_before_training(line, command, places):
    options, message = line.split(" -> ")
    before = read_files()
    run = command(rnn_mnist, options)
    assert (run.status, run.output) == (2, "")
    assert f"error: {message}" in " ".join(run.errors.split())
    assert read_files() == before


ERRORS = """\
--load gone.pt --data-dir gone -> cannot load gone.pt ([Errno 2] No such file
--load text -> cannot load text (
--data-dir folder -> cannot read or download folder/MNIST/raw: Error downloading train-images
--data-dir text -> cannot read or download text/MNIST/raw: [
--data-dir damaged -> cannot read or download damaged/MNIST/raw:
--validate 250 -> validate=250, limit=inf: no images to validate or train on
--lr 1e30 --batch-size 250 --save w.pt --log a -> the loss is not finite; try a smaller learning
--load w.pt --predict gone.png -> cannot read a digit from gone.png: [Errno 2] No such file
--load w.pt --predict blank.png -> cannot read a digit from blank.png: no strokes found; use JPEG
--load w.pt --predict blank.png text -> cannot read a digit from blank.png: no strokes found; \
cannot read a digit from text: cannot identify image file
"""


@parametrize("line", ERRORS.splitlines())
def test_an_error_is_one_line_and_changes_no_file(line, command, places, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    options, message = line.split(" -> ")
    before = read_files()
    status = command(cnn_mnist, options).status
    assert status.startswith(f"error: {message}")
    assert "\n" not in status
    assert read_files() == before


def test_help_groups_the_options(script, command):
    page = command(script, "--help")
    assert page.status == 0
    assert re.search(r"(?s)\n\ntraining:\n.*\n\ndata:\n.*\n\nresults:\n", page.output)


def test_device_auto_is_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert common.find_device("auto").type == "meta"


@parametrize(
    ("program", "has_prompt", "expected"),
    [
        ("wrapper", False, ["--epochs", "3"]),
        ("test_scripts.py", True, ["--epochs", "3"]),  # %run test_scripts.py --epochs 3
        ("ipykernel_launcher.py", True, []),
    ],
)
def test_a_program_reads_its_options_and_a_console_does_not(
    program, has_prompt, expected, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [f"/usr/lib/{program}", "--epochs", "3"])
    if has_prompt:
        monkeypatch.setattr(sys, "ps1", "In: ", raising=False)
    assert common.run(lambda argv: argv) == expected


def test_main_without_arguments_uses_the_defaults(script, small_mnist, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--unknown"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with raises(UserError, match="validate=5000"):
        script.main()


def test_output_may_be_missing(script, command, monkeypatch):
    """As in pythonw, which has no console."""
    monkeypatch.setattr(sys, "stdout", None)
    assert command(script, "--epochs 1").status == 0


def test_an_import_changes_nothing_and_create_model_sets_up_the_gpu():
    # `if True` allows the indentation.
    program = """if True:
        import os, torch
        from torch import backends, initial_seed
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # another test may have set it
        def state():
            return dict(os.environ), backends.cudnn.deterministic, initial_seed()
        before = state()
        import cnn_mnist, common, rnn_mnist
        assert before == state()
        for setting in (":4096:2", ":16:8"):  # the second one is the user's own
            common.create_model(cnn_mnist.CNN, 0)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == setting
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        assert backends.cudnn.deterministic
    """
    subprocess.run([sys.executable, "-c", program], cwd=HERE, check=True, timeout=300)


def test_a_mistake_in_the_program_keeps_its_traceback():
    with raises(FileNotFoundError):  # an OSError, as BrokenPipeError is
        common.run(lambda _: os.stat("missing"))


@posix
def test_ctrl_c_keeps_the_finished_epochs(small_mnist):
    """Without flushing, the lines would arrive at the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # The shell may ignore Ctrl-C.
    with start(cnn_mnist, "--batch-size 1 --epochs 30 --save w.pt --log log.csv") as process:
        next(line for line in process.stdout if "Epoch [2/30], Step [100/201]" in line)
        process.send_signal(signal.SIGINT)
        assert "finished" not in process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == 130
    assert len(Path("log.csv").read_text().splitlines()) == 2
    assert common.load_weights(CNN(), "w.pt")


@posix
@parametrize("options", ["--epochs 30", "--load w.pt --predict 7.png"])
def test_a_closed_pipe_ends_the_program_quietly(options, small_mnist):
    torch.save(CNN_WEIGHTS, "w.pt")
    draw_page(7).save("7.png")
    with start(cnn_mnist, options) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


# ---- pictures of your own ----


def draw_page(digit):
    """A picture of one digit, dark on light, not in the middle."""
    picture = Image.new("L", (500, 400), 255)
    ImageDraw.Draw(picture).text((250, 120), str(digit), fill=0, font_size=200)
    return picture


def read(page):
    page.save("page.png")
    return common.read_picture("page.png")


def with_grain(page, sigma=40):
    noise = Image.effect_noise(page.size, sigma).convert(page.mode)  # around 128
    return ImageChops.add(page, noise, offset=-128)


def on_transparency(page, level):
    return Image.merge("LA", (Image.new("L", page.size, level), ImageOps.invert(page)))


FORMS = {
    "on dark, coloured paper": lambda page: with_grain(ImageOps.colorize(page, "khaki", "navy")),
    "dark on transparency": lambda page: on_transparency(page, 0),
    "light on transparency": lambda page: on_transparency(page, 255),
    "cut out": lambda page: page.crop(ImageOps.invert(page).getbbox()),
    "on a desk, dark on two sides": lambda page: ImageOps.expand(page, (60, 0, 0, 60), 40),
    "with a pencil": lambda page: page.filter(ImageFilter.MaxFilter(9)).point(
        lambda x: 100 + x // 2
    ),
}


@parametrize("form", FORMS)
@parametrize("digit", [2, 4, 7])
def test_a_picture_of_any_form_is_read_like_a_plain_one(form, digit):
    plain, other = read(draw_page(digit)), read(FORMS[form](draw_page(digit)))
    assert 0.045 < other.mean() < 0.18  # near MNIST's 0.1307, for thin pens, too
    # The difference is up to 0.55 of the ink for a pencil, 0.25 for other paper, and more than 1
    # for another digit.
    assert (plain - other).abs().sum() < 0.7 * plain.sum()


def test_a_photo_is_rotated_as_its_camera_says():
    page = draw_page(7)
    exif = page.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    page.transpose(Image.Transpose.ROTATE_90).save("7.jpg", exif=exif)
    plain, other = read(page), common.read_picture("7.jpg")
    assert (plain - other).abs().sum() < 0.1 * plain.sum()


def test_a_digit_is_upright_and_where_mnist_has_it():
    page = Image.new("L", (300, 400), 255)
    ImageDraw.Draw(page).line(((100, 50), (100, 250), (180, 250)), fill=0, width=20)  # an L
    image = read(page)[0]
    assert image[:14, 15:].max() < 0.01  # nothing at the top right
    assert 18 <= (image.amax(dim=1) > 0.25).sum() <= 20  # rows with ink
    mass = torch.stack([image.sum(dim=0), image.sum(dim=1)]) / image.sum()
    assert (mass @ torch.arange(28.0)).tolist() == approx([14, 14], abs=0.3)


def test_predict_names_each_digit_that_it_can_read(script, network, device, command):
    model, page = network(), draw_page(2)
    torch.save(model.state_dict(), "weights.pt")
    confidence, digit = model(read(page)[None]).softmax(dim=1).max(dim=1)
    options = f"--device {device} --load weights.pt --predict"
    expected = f"page.png: {digit.item()} ({confidence.item():.1%})\n"
    assert command(script, f"{options} gone.png page.png").output == expected
    run = command(script, f"{options} page.png")
    assert (run.status, run.evaluation) == (0, None)
    assert run.model.fc.weight.device.type == device
