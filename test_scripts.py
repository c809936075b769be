"""Tests of the scripts, on the CPU and on the accelerator if it works: python -m pytest

They need no internet access. A test on the real MNIST reads it from ./data, and is skipped if it
is not there.
"""

import argparse
import contextlib
import copy
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from pytest import approx, raises
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

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
with contextlib.suppress(argparse.ArgumentTypeError):  # if an accelerator cannot compute
    DEVICES = sorted({"cpu", common.working_device("auto").type})

# One thread, here and in subprocesses: on a busy machine, several would wait for each other.
torch.set_num_threads(1)
# With PYTHONUNBUFFERED, as in many containers, a missing flush would not be seen.
os.environ.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="")

# Images and labels of synthetic digits, for three training steps and two batches of evaluation.
torch.manual_seed(1)
TRAIN, VAL = common.draw_digits(250), common.draw_digits(130)


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

    def __init__(self, inputs=784, outputs=10):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, x))
        return self.fc(F.dropout(self.norm(x.flatten(1)), training=self.training))


def write_idx(file, values):
    """Write uint8 values in MNIST's format: 0, 0, type 8, number of dimensions, sizes, values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes())


@pytest.fixture
def small_mnist(empty_folder):
    """TRAIN and VAL as MNIST's training and test images in ./data."""
    RAW.mkdir(parents=True)
    for split, (images, labels) in (("train", TRAIN), ("t10k", VAL)):
        write_idx(RAW / f"{split}-images-idx3-ubyte", images)
        write_idx(RAW / f"{split}-labels-idx1-ubyte", labels.byte())


Run = namedtuple("Run", "status output errors model evaluation", defaults=(None, None))


@pytest.fixture
def command(small_mnist, capsys):
    """A function that runs a script's command line; the last one of repeated options counts."""

    def command(script, options=""):
        argv = ["--device", "cpu", "--validate", "50", *options.split()]
        try:
            found = common.run(lambda _: script.main(argv))
        except SystemExit as ended:
            output, errors = capsys.readouterr()
            if isinstance(ended.code, str):  # Python prints it, and exits with status 1.
                return Run(1, output, ended.code)
            return Run(ended.code, output, errors)
        return Run(0, *capsys.readouterr(), *found)

    return command


@pytest.fixture
def file(empty_folder):
    """A file of a former run."""
    file = Path("results.png")
    file.write_text("of a former run")
    return file


def start(script, options):
    """Start a script in a subprocess, which is killed after five minutes."""
    command = [sys.executable, script.__file__, "--device", "cpu", "--validate", "50"]
    process = subprocess.Popen([*command, *options.split()], text=True, stdout=PIPE, stderr=PIPE)
    timer = threading.Timer(300, process.kill)
    timer.daemon = True
    timer.start()
    return process


def same_weights(model, other):
    """Whether all weights and buffers are the same, bit for bit."""
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def assert_one_line(run, start, end=""):
    assert run.status == 1
    assert re.fullmatch(f"error: {re.escape(start)}.*{re.escape(end)}", run.errors)


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
    assert torch.allclose(cnn(images), cnn.fc(x.flatten(1)), atol=1e-5)
    assert cnn.fc.weight.shape == (3, 32 * 7 * 7)
    assert torch.equal(cnn(images.squeeze(1)), cnn(images.flatten(1)))  # as people have them


def test_bug_lstm_without_batch_first():
    """The output comes from the last layer's state after the last row of each image."""
    model, images = RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(images.squeeze(1))  # (2, 3, 128)
    assert torch.allclose(model(images), model.fc(hidden[-1]), atol=1e-6)
    assert RNN(8, 1, 5, 4)(torch.rand(3, 40, 5)).shape == (3, 4)  # sequences of another size


OUTPUT = r"""Data: mnist \(200 training, 50 validation, 130 test images\)
Inputs \(training\): \(100, 1, 28, 28\) from 0 to 1
Inputs \(validation\): \(50, 1, 28, 28\) from 0 to 1
Device: cpu, Model: (CNN \(20,490|RNN \(214,282) parameters\)
Epoch \[1/2\], Step \[2/2\], Loss: #
Epoch \[1/2\], Training loss: #, Validation loss: #, Validation accuracy: %, Time: \d+\.\d\d s
Epoch \[2/2\], Step \[2/2\], Loss: #
Epoch \[2/2\], Training loss: #, Validation loss: #, Validation accuracy: %, Time: \d+\.\d\d s
Training finished.
Test loss: #, Test accuracy: %
Class        Precision    Recall        F1     Count
0 """.replace("#", r"\d\.\d{4}").replace("%", r"\d+\.\d\d%")


def test_bug_undefined_names(script, small_mnist):
    """The script runs from start to end, and prints its progress."""
    process = start(script, "--epochs 2")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert re.match(OUTPUT, output)


def test_bug_test_set_never_evaluated(script, command):
    """The script tests the trained network on the test images."""
    run = command(script, "--epochs 2 --lr 0.003")
    loss = F.cross_entropy(run.model(VAL[0][:, None] / 255), VAL[1])
    assert run.evaluation.loss == approx(loss.item(), abs=1e-3)


@parametrize(("size", "steps"), [(100, "3/3"), (2, "100/125 125/125")])
def test_bug_steps_counted_without_the_last_batch(size, steps, capsys):
    """250 images are three steps of 100, because the last, incomplete batch is a step, too."""
    train(CNN, digits(batch_size=size), epochs=1)
    assert re.findall(r"Step \[(.*)\]", capsys.readouterr().out) == steps.split()


# ---- train ----


def test_both_scripts_have_the_same_loop_but_for_two_numbers():
    cnn, rnn = (inspect.getsource(script.train) for script in (cnn_mnist, rnn_mnist))
    assert cnn.count("0.01") == 2
    assert "shift=1)  # by at most 1 pixel" in cnn
    cnn = (
        cnn.replace("0.01", "0.005").replace("shift=1)", "shift=2)").replace("1 pixel", "2 pixels")
    )
    assert cnn == rnn


def test_smoke_one_batch(script, network, device):
    data = digits(batch_size=250)  # The batch is on the CPU.
    data.device = torch.device(device)
    before, after = (script.train(network, data, epochs=n)[0] for n in (0, 1))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert not torch.equal(old, new)


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


SMOOTH = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11), label_smoothing=0.1)


@parametrize(
    ("options", "optimizer", "criterion"),
    [
        ({}, torch.optim.Adam, F.cross_entropy),
        ({"optimizer": momentum, "criterion": SMOOTH, "lr": 0.001}, momentum, SMOOTH),
    ],
)
@parametrize("network", [CNN, RNN, Own])
def test_training_is_that_of_the_tutorial(network, options, optimizer, criterion, capsys):
    """In an order that depends only on seed and epoch, with any optimizer and loss."""
    loader = digits().train_loader
    _, history = train(network, digits(), epochs=2, seed=3, **options)
    printed = re.findall(r"\], Loss: (.*)", capsys.readouterr().out)  # of each epoch's last step
    torch.manual_seed(3)
    model = network()
    adam = optimizer(model.parameters(), lr=0.001)
    for epoch in (1, 2):
        torch.manual_seed(3000 + epoch)
        total = 0
        for batch in torch.randperm(250).split(100):
            loss = criterion(model(loader.inputs[batch]), loader.labels[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.item() * len(batch)
        assert float(printed[epoch - 1]) == approx(loss.item(), abs=1e-3)
        assert history[epoch - 1].train_loss == approx(total / 250, abs=1e-4)
    loss = criterion(model.eval()(VAL[0][:, None] / 255), VAL[1])
    assert history[1].val_loss == approx(loss.item(), abs=1e-3)


@parametrize("options", [{}, {"one_cycle": True}, {"augment": True}])
@parametrize("network", [CNN, RNN, Own])
def test_the_same_call_gives_the_same_weights(network, device, options):
    """Also if random numbers were drawn before it, or are drawn after each epoch."""
    data = digits(device)

    def measure(model, history):
        evaluate(model, data.train_loader)

    model, _ = train(network, data, epochs=2, **options)  # draws random numbers, too
    assert same_weights(model, train(network, data, epochs=2, after_epoch=measure, **options)[0])
    assert not same_weights(model, train(network, data, epochs=2, seed=1, **options)[0])


def test_the_command_line_and_train_give_the_same_weights(script, network, command):
    options = "--limit 110 --validate 60 --batch-size 64 --epochs 2 --one-cycle --augment --seed 3"
    trained = command(script, f"{options} --lr 0.002").model
    data = common.load_data(limit=110, validate=60, batch_size=64, device="cpu")
    model, _ = script.train(network, data, epochs=2, lr=0.002, one_cycle=True, augment=True, seed=3)
    assert same_weights(trained, model)
    plain, _ = script.train(network, common.load_data(validate=50, device="cpu"), epochs=1)
    assert same_weights(command(script, "--epochs 1").model, plain)


def test_a_network_is_never_trained_twice():
    model = Own()
    for network in (model, lambda: model):
        with raises(TypeError, match="creates a new network: CNN, not CNN()"):
            train(network, digits())
    train(lambda: copy.deepcopy(model), digits(), epochs=1)  # trains a copy further


def test_an_optimizer_without_lr_is_refused_before_anything_is_created():
    with raises(ValueError, match="pass a learning rate"):
        train(pytest.fail, digits(), optimizer=torch.optim.SGD)


def test_each_epoch_trains_validates_and_calls_after_epoch(capsys):
    """A true value ends the training, which is printed. The test images are not touched."""
    data, calls = digits(), []
    data.test_loader = map(pytest.fail, ["touched"])

    def after_epoch(model, history):
        calls.append((model.training, len(history)))
        return np.bool_(len(history) == 2)

    model, history = train(Own, data, epochs=5, after_epoch=after_epoch)
    modes = [(training, len(inputs)) for training, inputs in model.seen]
    epoch = [(True, 100), (True, 100), (True, 50), (False, 100), (False, 30)]
    assert modes == [(False, 100)] * 3 + epoch * 2  # first, the check of the network
    assert calls == [(False, 1), (False, 2)]
    assert [row.epoch for row in history] == [1, 2]
    # the columns of pandas.DataFrame(history)
    assert " ".join(history[0]._fields) == "epoch train_loss val_loss val_accuracy seconds"
    assert capsys.readouterr().out.endswith("\nafter_epoch returned a true value: training ends.\n")


def test_seconds_are_those_of_the_training_steps(monkeypatch):
    seen = []  # A batch takes a second.
    monkeypatch.setattr(Own, "__call__", lambda *args: seen.append(1) or nn.Module.__call__(*args))
    monkeypatch.setattr(time, "perf_counter", lambda: len(seen))
    _, history = train(Own, digits(), epochs=2)
    assert [row.seconds for row in history] == [3, 3]  # without the evaluation


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

    Each pixel of these images holds its own position, so the result says where it came from. As
    complex numbers x + yi, because multiplying by i rotates by 90 degrees.
    """
    line = torch.arange(1.0, 21)
    images = torch.stack(torch.meshgrid(line, line, indexing="xy")).expand(5000, -1, -1, -1)
    moved = common.random_affine(images.to(device), shift=2).cpu()
    position = torch.complex(moved[:, 0], moved[:, 1])
    here, right, below = position[:, 9, 9], position[:, 9, 10], position[:, 10, 9]
    assert torch.allclose(below - here, (right - here) * 1j, atol=1e-3)
    assert (right - here).angle().rad2deg().aminmax() == approx((-10, 10), abs=0.1)
    assert (right - here).abs().reciprocal().aminmax() == approx((0.9, 1.1), abs=0.001)
    shift = torch.view_as_real(right + below) / 2 - 10.5  # of the centre of the image
    assert shift.abs().amax(dim=0).tolist() == approx([2, 2], abs=0.01)
    assert shift.diff().max() > 3  # not only along the diagonal
    assert moved.aminmax() == approx((1, 20), abs=0.001)  # What is outside repeats the border.
    assert common.random_affine(torch.ones(3, 8, 8), shift=2).shape == (3, 8, 8)  # no channel
    with raises(ValueError, match="square images, not 14x28"):
        common.random_affine(torch.ones(2, 1, 14, 28), shift=2)


class Calls(TorchDispatchMode):
    """While it is active, `names` gathers the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@parametrize("options", [{}, {"one_cycle": True, "augment": True}])
def test_a_step_neither_waits_for_the_device_nor_copies(device, options):
    def count(batch_size):
        data = digits(device, batch_size)
        with Calls() as calls:
            train(Own, data, epochs=1, **options)
        # item(), and conditions on tensors, read a number; to() copies if it has to.
        return [calls.names.count(name) for name in ("_local_scalar_dense", "_to_copy")]

    assert count(250) == count(130)  # 1 and 2 steps; the last one is printed
    assert count(250)[0] > 0


# ---- what is checked before the first step ----


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Spread(nn.Module):
    def forward(self, x):
        return x + x.std(dim=0).sum()


def chain(*layers):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), *layers)


def transformer(batch_first):
    layer = nn.TransformerEncoderLayer(28, 4, 32, batch_first=batch_first)
    return nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(784, 10))


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
    "a Transformer with the same bug": (lambda: transformer(False), DEPENDS),
    "other samples only raise the outputs": (chain(Spread()), DEPENDS),
    "a good Transformer": (lambda: transformer(True), ""),
    "CNN": (CNN, ""),
    "RNN": (RNN, ""),
    "BatchNorm and dropout": (Own, ""),
    "log-softmax": (chain(nn.LogSoftmax(1)), ""),
    "random numbers": (chain(Noise()), ""),
    "outputs that are all 0.1": (chain(nn.Threshold(1e9, 0.1)), ""),
    "a fixed batch size": (chain(nn.Unflatten(0, (10, 10)), nn.Flatten(0, 1)), ""),
}


@parametrize("name", CHECKED)
def test_the_bugs_of_the_tutorial_are_seen_in_any_network_and_no_others(name, device, capsys):
    """Each time it is trained, and with a loss of one's own."""
    network, warning = CHECKED[name]
    data = make_data(TRAIN, [part[:100] for part in TRAIN], range(10), device=device)
    data.val_loader.inputs[:, :, -8:] = 0  # as the lowest rows of MNIST are
    for criterion in (F.cross_entropy, F.nll_loss):
        train(network, data, epochs=0, criterion=criterion)
        printed = "".join(re.findall(r"Warning.*\n", capsys.readouterr().out))
        assert printed == warning


def test_two_classes_and_a_single_sample_raise_no_false_alarm(capsys):
    pair = VAL[0][:1], VAL[1][:1] % 2
    data = make_data(pair, pair, "ab", device="cpu")
    for seed in range(20):
        train(chain(nn.LazyLinear(2)), data, epochs=0, seed=seed)
    assert "Warning" not in capsys.readouterr().out


SAMPLES = (torch.rand(20, 3), torch.arange(20) % 2)
PACKED = (pack_sequence([torch.rand(4, 3)]), torch.tensor([0]))


@parametrize(
    ("loader", "classes", "outputs", "says"),
    [
        ([SAMPLES], "a", 1, r"two classes or more to learn, not \['a'\]"),
        ([SAMPLES], "ab", 3, r"returned torch.Size\(\[20, 3\]\) for 20 inputs, 2 classes"),
        ([], "ab", 2, "the validation loader has no batch"),
        ([PACKED], "ab", 2, "the validation loader has no batch .* of tensors"),
        ([(SAMPLES[0], SAMPLES[1] + 1)], "ab", 2, "from 0 to 1, .* from 1 to 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(loader, classes, outputs, says):
    data = Data([SAMPLES], loader, classes, device="cpu")
    with raises(ValueError, match=says):
        train(lambda: nn.Linear(3, outputs), data, after_epoch=pytest.fail)


def test_a_former_split_is_refused():
    with raises(TypeError):
        Data([SAMPLES], [SAMPLES], "ab", "validation")
    with raises(TypeError):
        make_data(SAMPLES, SAMPLES, "ab", "validation")


# ---- data ----


@parametrize(
    ("inputs", "labels", "shape"),
    [
        (np.ones((2, 5)), np.array([1.0, 0]), (2, 5)),
        (np.ones((2, 8, 8), np.int32), np.array([1, 0], np.uint16), (2, 8, 8)),
        (np.full((2, 8, 8), 255, np.uint8), [True, False], (2, 1, 8, 8)),
        (np.full((2, 3, 8, 8), 255, np.uint8), [1, 0], (2, 3, 8, 8)),
    ],
)
def test_make_data_takes_what_people_have(inputs, labels, shape, device):
    pair = inputs, labels
    data = make_data(pair, pair, "ab", test_pair=pair, device=device)
    for loader in (data.train_loader, data.val_loader, data.test_loader):
        ((found, targets),) = loader
        assert torch.equal(found.cpu(), torch.ones(shape))
        assert found.dtype == torch.float32
        assert sorted(targets.tolist()) == [0, 1]
        assert found.device.type == targets.device.type == data.device.type == device
    assert repr(targets.cpu()) == "tensor([1, 0])"  # not shuffled, and of type int64


@parametrize(
    ("inputs", "labels", "says"),
    [
        ([[5.0]] * 5, [0, 1, 0], "5 inputs, 3 labels"),
        ([], [], "0 inputs, 0 labels"),
        *(
            ([[5.0]] * 2, labels, r"labels must be whole numbers \(N,\) from 0 to 1")
            for labels in ([0.9, 1], [1, 2], [0, -100], [0, np.nan], [[0], [1]], [[1, 0], [0, 1]])
        ),
        (torch.ones(2, 1).byte(), [0, 1], "only uint8 inputs are divided by 255"),
    ],
)
def test_make_data_refuses_what_does_not_fit(inputs, labels, says):
    good = [[5.0]] * 2, [0, 1]
    with raises(ValueError, match=says):
        make_data(good, good, "ab", test_pair=(inputs, labels), device="cpu")


def test_own_loaders_and_lists_of_batches_are_trained_on():
    """Colour images whose batches are on the CPU, with labels of type uint8."""
    samples = TensorDataset(torch.randn(60, 3, 8, 8), torch.arange(60).byte() % 20)
    loader = DataLoader(samples, 8, shuffle=True)
    data = Data(loader, list(loader), range(20), device="cpu")
    model, same = (train(lambda: Own(192, 20), data, epochs=2)[0] for _ in range(2))
    assert same_weights(model, same)
    assert evaluate(model, loader).confusion.sum(dim=1).tolist() == [3] * 20  # all labels


def test_a_network_that_changes_its_input_does_not_change_the_data():
    loader = digits().val_loader
    next(iter(loader))[0].zero_()
    assert loader.inputs[:100].any()


@parametrize(("size", "batches"), [(1, [100, 30]), (120, [120, 10])])
def test_evaluation_takes_at_least_100_samples_at_a_time(size, batches):
    assert [len(labels) for _, labels in digits(batch_size=size).val_loader] == batches


@parametrize("options", [{}, {"limit": 7, "batch_size": 3}])
def test_validation_images_are_random_always_the_same_and_never_trained_on(options, small_mnist):
    torch.manual_seed(5)
    data = common.load_data(validate=100, device="cpu", **options)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(0))
    limit = options.get("limit", 150)
    parts = {"train": order[100 : 100 + limit], "val": order[:100]}
    for name, part in parts.items():
        loader = getattr(data, f"{name}_loader")
        assert torch.equal(loader.inputs, TRAIN[0][part][:, None] / 255)
        assert torch.equal(loader.labels, TRAIN[1][part])
    assert torch.equal(data.test_loader.inputs, VAL[0][:, None] / 255)
    assert len(data.train_loader) == (2 if limit == 150 else 3)  # batches


@parametrize("options", [{"validate": 250}, {"validate": 0}, {"validate": 50, "limit": 0}])
def test_limit_and_validate_that_leave_no_images_are_refused(options, small_mnist):
    with raises(UserError, match="no images to validate or train on"):
        common.load_data(**options)


@parametrize("name", ["fashion-mnist", "kmnist"])
def test_each_dataset_has_its_folder_and_classes(name, small_mnist, monkeypatch):
    """By default, on the CPU if there is no accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    dataset = common.DATASETS[name]
    assert dataset.__name__.lower() == name.replace("-", "")
    Path("data/MNIST").rename(f"data/{dataset.__name__}")
    assert common.load_data(name, validate=50).classes == dataset.classes


def test_synthetic_digits_do_not_leak_and_are_the_same_in_each_run():
    state = torch.get_rng_state()
    data = common.load_data("synthetic", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = common.load_data("synthetic", device="cpu")
    assert torch.equal(data.val_loader.inputs, again.val_loader.inputs)
    parts = [loader.inputs for loader in (data.train_loader, data.val_loader, data.test_loader)]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 70_000


MNIST = HERE / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST.is_file(), reason="MNIST is not in ./data")
@parametrize(
    ("script", "network", "limit", "least"),
    [(cnn_mnist, CNN, 55_000, 0.95), (rnn_mnist, RNN, 10_000, 0.8)],  # The LSTM is slower.
)
def test_real_mnist_is_learned(script, network, limit, least):
    data = common.load_data(data_dir=HERE / "data", limit=limit, device=DEVICES[-1])
    _, history = script.train(network, data, epochs=1, one_cycle=True)
    assert history[0].val_accuracy > least


# ---- evaluate and report ----


def test_evaluate_computes_each_figure(device):
    """The network's logits are its inputs; no sample belongs to the third class."""
    model = nn.Linear(3, 3, bias=False).to(device)
    nn.init.eye_(model.weight)
    logits, labels = 3 * torch.eye(3)[[0, 1, 0, 1]], torch.tensor([0, 0, 0, 1])
    loader = DataLoader(TensorDataset(logits, labels.byte()), 3)
    evaluation = evaluate(model, loader)
    assert evaluation.loss == approx(0.84493, abs=1e-4)  # ln(e^3 + 2) - 3 * 3 / 4
    assert evaluation.accuracy == 0.75
    assert evaluation.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert torch.equal(evaluation.logits, logits)
    assert torch.equal(evaluation.labels, labels)
    assert model.training  # as before
    assert not evaluation.logits.requires_grad
    assert not evaluation.logits.is_inference()  # so that people may compute gradients with it
    with raises(IndexError, match="Target 3 is out of bounds"):
        evaluate(model, [(logits, labels + 2)])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9, 1]).to(device))  # on the device
    assert evaluate(model, loader, weighted).loss == approx(0.34492, abs=1e-4)
    with raises(FloatingPointError):
        common.check_losses(float("inf"), evaluation.loss)


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


def reuse(loader):
    """Yield batches of one size that share their memory, as some loaders do."""
    (batch, *_), *_ = loader
    for images, labels in loader:
        yield batch.copy_(images), labels


def test_errors_in_colour_most_confident_first_with_names_that_fit(device):
    """The images are standardized, and the loader shuffles them."""
    pixels, labels = torch.rand(300, 3, 9, 9), torch.zeros(300, device=device).long()
    pixels[:, :, 0, :2] = torch.tensor([0.0, 1])  # Each image has the lowest and the highest value.
    images, model = (pixels.to(device) - 0.5) / 0.25, Own(243, 2).to(device)
    loader = common.Loader(images, labels, 50, shuffle=True)
    common.draw_errors(model, reuse(loader), [8, "WALKING_UPSTAIRS"], "e.png")
    confidence, order = common.predict(model, images).softmax(dim=1)[:, 1].sort(descending=True)
    sheet = pil_to_tensor(Image.open("e.png"))
    drawn = sheet[:, 46::140, 60::120].flatten(1).T / 255  # the middle of each image
    assert torch.allclose(drawn, pixels[order[:100].cpu(), :, 4, 4], atol=0.01)
    text = f"true: 8\npred: WALKING_UPST\nconf.: {confidence[0]:.1%}"
    expected = Image.new("RGB", (120, 50), "white")
    ImageDraw.Draw(expected).text((18, 0), text, "black", font_size=13, spacing=2)
    assert torch.equal(sheet[:, 90:140, :120], pil_to_tensor(expected))


@parametrize(("count", "height"), [(0, 140), (11, 280)])
def test_the_sheet_is_as_high_as_its_mistakes_need(count, height, capsys):
    images = torch.eye(2)[[1] * count + [0]].view(-1, 1, 1, 2)  # the logits
    common.draw_errors(nn.Flatten(), [(images, torch.zeros(count + 1).int())], "ab", "e.png")
    assert Image.open("e.png").size == (1200, height)
    assert capsys.readouterr().out == f"e.png shows {count} of {count} mistakes.\n"


def test_report_and_log_are_those_of_the_last_epoch(script, command, file):
    Path("log.csv").write_text("of a former run")
    run = command(script, f"--epochs 2 --lr 0.003 --log log.csv --errors {file}")
    *lines, last = run.output.splitlines()
    matrix = [list(map(int, line.split()[1:])) for line in lines[-10:]]
    assert matrix == run.evaluation.confusion.tolist()
    wrong = round(130 * (1 - run.evaluation.accuracy))
    assert last == f"results.png shows {min(wrong, 100)} of {wrong} mistakes."
    head, first, second = Path("log.csv").read_text().splitlines()
    assert head == "epoch,train_loss,val_loss,val_accuracy,seconds"
    assert first.startswith("1,")
    epoch, train_loss, val_loss, accuracy, _ = map(float, second.split(","))
    assert epoch == 2
    assert f"Training loss: {train_loss:.4f}, Validation loss: {val_loss:.4f}" in run.output
    assert f"Validation accuracy: {accuracy:.2%}, " in run.output


def test_zero_epochs_only_test(script, command):
    run = command(script, "--epochs 0 --one-cycle")
    score = f"Test loss: {run.evaluation.loss:.4f}, Test accuracy: {run.evaluation.accuracy:.2%}"
    assert run.output.splitlines()[4] == score
    assert not run.model.training


# ---- files ----


CNN_WEIGHTS = CNN().state_dict()


def test_saved_weights_are_loaded(device, file):
    """Those of this network include the buffers of BatchNorm."""
    model, _ = train(Own, digits(device), epochs=1)
    common.save_weights(model, file)
    loaded = common.load_weights(Own(), file)
    assert same_weights(model.cpu(), loaded)
    assert not loaded.training


def test_saved_weights_are_a_plain_state_dict_on_the_cpu(device, command, file):
    trained = command(cnn_mnist, f"--device {device} --epochs 2 --save {file}").model
    weights = torch.load(file)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert all(tensor.is_contiguous() for tensor in weights.values())  # in the ordinary format
    loaded = command(cnn_mnist, f"--device {device} --epochs 1 --lr 0 --load {file}").model
    assert same_weights(trained, loaded)


def test_weights_that_somebody_saved_on_a_gpu_are_loaded(file, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    torch.save(CNN_WEIGHTS, file)
    assert torch.equal(common.load_weights(CNN(), file).fc.weight, CNN_WEIGHTS["fc.weight"])


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
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as torch.load's default
    torch.save(OTHER_WEIGHTS[content], file)
    says = r"cannot load results.png \(.*\); use a file that --save wrote for the network RNN, "
    with raises(UserError, match=says):
        common.load_weights(RNN(), file)
    assert not Path("trace").exists()


@parametrize("content", [None, "seven is a digit"])
def test_a_file_without_weights_is_an_error_before_the_data_are_read(content, command):
    RAW.rename("gone")
    if content:
        Path("w.pt").write_text(content)
    assert_one_line(command(cnn_mnist, "--load w.pt"), "cannot load w.pt (", "of the same size")


@parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError("full"), 1, "error: cannot write results.png: full; choose another path"),
    ],
)
def test_an_interrupt_or_a_full_disk_keeps_the_file(
    error, status, says, command, file, monkeypatch
):
    def fail(*args):
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    run = command(cnn_mnist, f"--save {file} --log log.csv")
    assert (run.status, run.errors) == (status, says)
    assert file.read_text() == "of a former run"
    assert sorted(os.listdir()) == ["data", file.name]


@parametrize("name", ["file/w.pt", "a" * 252])
def test_a_name_that_cannot_be_written_is_an_error_of_one_line(name):
    Path("file").write_text("")
    with raises(UserError, match="cannot write .*; choose another path"):
        common.save_weights(nn.Linear(1, 1), name)


def test_a_loss_that_is_not_finite_saves_nothing(command, file):
    """Here, that of the validation: the only step computes its loss before it changes weights."""
    run = command(cnn_mnist, f"--save {file} --log log.csv --lr 1e30 --batch-size 250")
    assert_one_line(run, "the loss is not finite; try a smaller learning rate")
    assert file.read_text() == "of a former run"
    assert not Path("log.csv").exists()


@parametrize("place", ["empty", "data/MNIST/raw/train-labels-idx1-ubyte", "data"])
def test_missing_or_damaged_data_are_one_line_and_stay(place, command, monkeypatch):
    os.mkdir("empty")
    damaged = RAW / "train-images-idx3-ubyte"
    damaged.write_bytes(b"damaged")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    run = command(cnn_mnist, f"--data-dir {place}")
    assert_one_line(run, f"cannot read or download {place}/MNIST/raw: ", "use --dataset synthetic")
    assert ("Error downloading" in run.errors) == (place == "empty")
    assert damaged.read_bytes() == b"damaged"


# ---- command line ----


def test_hidden_and_layers_shape_the_lstm(command):
    lstm = command(rnn_mnist, "--epochs 0 --hidden 8 --layers 3").model.lstm
    assert (lstm.hidden_size, lstm.num_layers) == (8, 3)


WRONG_OPTIONS = """\
--epochs x
--epochs -1
--epochs 0 --save w.pt
--epochs 0 --log l.csv
--device gpu
--batch-size 0
--limit 0
--validate 0
--hidden 0
--layers 0
--lr -1
--lr nan
--seed 9999999999999999
--predict 7.png
--predict 7.png --load w.pt --dataset kmnist
--predict 7.png --load w.pt --dataset fashion-mnist
--predict 7.png --load w.pt --errors e.png
--predict 7.png --load w.pt --log l.csv
--save ./a --log a
"""


@parametrize("options", WRONG_OPTIONS.splitlines())
def test_a_wrong_option_is_named(options, command):
    run = command(rnn_mnist, options)
    assert run.status == 2
    assert re.search(rf"error: arguments? {options.split()[0]}\b", run.errors)


def test_the_largest_seed_trains(command):
    assert command(cnn_mnist, f"--epochs 1 --seed {10**15}").status == 0


@parametrize("option", ["--save", "--log", "--errors"])
@parametrize("place", ["folder", "missing/file", "file/file", "a" * 252, os.devnull])
def test_a_bad_place_is_an_error_before_training(option, place, command):
    os.mkdir("folder")
    Path("file").write_text("")
    run = command(cnn_mnist, f"{option} {place}")
    assert (run.status, run.output) == (2, "")
    assert f"argument {option}: cannot write {place}: " in run.errors
    assert sorted(os.listdir()) == ["data", "file", "folder"]


def test_help_groups_the_options_and_names_the_rates(script, command):
    page = command(script, "--help")
    assert page.status == 0
    assert re.search(r"(?s)\n\ntraining:\n.*\n\ndata:\n.*\n\nresults:\n", page.output)
    assert "with --one-cycle 0.01 (CNN) or 0.005 (LSTM)" in " ".join(page.output.split())


def test_device_auto_is_the_accelerator_and_has_to_work(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    with raises(argparse.ArgumentTypeError, match="auto cannot be used: .*; try --device cpu$"):
        common.working_device("auto")


@parametrize(
    ("program", "has_prompt", "expected"),
    [
        ("test_scripts.py", False, ["--epochs", "3"]),
        ("test_scripts.py", True, ["--epochs", "3"]),  # %run test_scripts.py --epochs 3
        ("wrapper", False, ["--epochs", "3"]),
        ("ipykernel_launcher.py", True, []),
    ],
)
def test_a_program_has_options_and_a_console_keeps_its_own(
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


def test_an_import_changes_nothing_and_training_sets_up_the_gpu():
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
    with raises(FileNotFoundError):  # an OSError, as a closed pipe is
        common.run(lambda _: os.stat("missing"))


@posix
def test_ctrl_c_keeps_the_finished_epochs(small_mnist):
    """Without flushing, the lines would arrive at the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
    with start(cnn_mnist, "--batch-size 1 --epochs 30 --save w.pt --log log.csv") as process:
        next(line for line in process.stdout if "Epoch [2/30], Step [100/200]" in line)
        process.send_signal(signal.SIGINT)
        assert "finished" not in process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == 130
    assert len(Path("log.csv").read_text().splitlines()) == 2
    assert common.load_weights(CNN(), "w.pt")


@posix
@parametrize("options", ["--epochs 30", "--load w.pt --predict 7.png"])
def test_a_closed_pipe(options, small_mnist):
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
    noise = torch.randn(page.size[::-1], generator=torch.Generator().manual_seed(0))
    return to_pil_image((pil_to_tensor(page) + sigma * noise).clamp(0, 255).byte())


def on_transparency(page, level):
    return Image.merge("LA", (Image.new("L", page.size, level), ImageOps.invert(page)))


FORMS = {
    "on dark, coloured paper": lambda page: with_grain(ImageOps.colorize(page, "khaki", "navy")),
    "dark on transparency": lambda page: on_transparency(page, 0),
    "light on transparency": lambda page: on_transparency(page, 255),
    "cut out": lambda page: page.crop(ImageOps.invert(page).getbbox()),
    "on a desk, dark on two sides": lambda page: ImageOps.expand(page, (60, 0, 0, 60), 40),
    "with a pencil": lambda page: with_grain(
        page.filter(ImageFilter.MaxFilter(9)).point(lambda x: 100 + x // 2), 10
    ),
    "with a felt pen": lambda page: page.filter(ImageFilter.MinFilter(9)),
}


@parametrize("form", FORMS)
@parametrize("digit", [2, 4, 7])
def test_a_picture_of_any_form_is_read_like_a_plain_one(form, digit):
    plain, other = read(draw_page(digit)), read(FORMS[form](draw_page(digit)))
    assert 0.06 < other.mean() < 0.18  # near MNIST's 0.1307, for thin and for thick pens
    # Another pen changes up to 0.6 of the ink, other paper 0.4, and another digit more than 1.
    most = 0.6 if form.startswith("with") else 0.4
    assert (plain - other).abs().sum() < most * plain.sum()


def test_a_photo_is_rotated_as_its_camera_says():
    page = draw_page(7)
    exif = page.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    page.transpose(Image.Transpose.ROTATE_90).save("7.jpg", exif=exif)
    plain, other = read(page), common.read_picture("7.jpg")
    assert (plain - other).abs().sum() < 0.1 * plain.sum()


def test_a_digit_at_the_border_is_kept():
    stroke = torch.zeros(1, 64, 64)
    stroke[:, :, 28:36] = 1
    assert torch.equal(common.drop_border(stroke), stroke)


def test_a_digit_is_upright_and_where_mnist_has_it():
    page = Image.new("L", (300, 400), 255)
    ImageDraw.Draw(page).line(((100, 50), (100, 250), (180, 250)), fill=0, width=20)  # an L
    image = read(page)[0]
    assert 18 <= (image.amax(dim=1) > 0.25).sum() <= 20  # rows with ink
    assert image[:14, 15:].max() < 0.01  # nothing at the top right
    mass = torch.stack([image.sum(dim=0), image.sum(dim=1)]) / image.sum()
    assert (mass @ torch.arange(28.0)).tolist() == approx([14, 14], abs=0.3)


def test_predict_names_the_class_and_its_confidence(device, capsys):
    """Also with dropout, whose network has to be in evaluation mode, and with two classes."""
    model = Own(outputs=2).to(device)
    image = read(draw_page(7))
    common.predict_pictures(model, ["page.png"], ["three", "eight"])
    confidence, label = common.predict(model, image[None]).softmax(dim=1)[0].max(dim=0)
    expected = f"page.png: {['three', 'eight'][label]} ({confidence:.1%})\n"
    assert capsys.readouterr().out == expected


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(device, command):
    torch.save(CNN_WEIGHTS, "weights.pt")
    draw_page(2).save("good.png")
    Path("text.png").write_text("seven")
    with_grain(Image.new("L", (300, 200), 240), 4).save("blank.png")
    pictures = "gone.png text.png blank.png good.png"
    run = command(cnn_mnist, f"--load weights.pt --predict {pictures}")
    assert run.output.startswith("good.png: ")
    assert_one_line(run, "cannot read a digit from gone.png: [Errno 2]")
    for reason in ("text.png: cannot", "blank.png: no strokes"):
        assert f"cannot read a digit from {reason}" in run.errors
    run = command(cnn_mnist, f"--device {device} --load weights.pt --predict good.png")
    assert (run.status, run.evaluation) == (0, None)
    assert run.model.fc.weight.device.type == device
