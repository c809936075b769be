"""Tests of the scripts, on the CPU and on the accelerator if it works: python -m pytest

They need no internet access. A test on the real MNIST reads it from ./data, and is skipped if it
is not there.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from pytest import approx, raises
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import cnn_mnist
import common
import rnn_mnist
from cnn_mnist import CNN
from common import UserError
from rnn_mnist import RNN

RAW = Path("data/MNIST/raw")
parametrize = pytest.mark.parametrize
HERE = Path(__file__).resolve().parent
DEVICES = ["cpu"]
with contextlib.suppress(argparse.ArgumentTypeError):  # if an accelerator cannot compute
    DEVICES = sorted({"cpu", common.find_device("auto").type})

# One thread, here and in subprocesses: on a busy machine, several would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# ---- helpers ----


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in a new, empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[cnn_mnist, rnn_mnist], ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def write_idx(file, values):
    """Write uint8 values in MNIST's format: 0, 0, type 8, number of dimensions, sizes, values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes())


@pytest.fixture
def small_mnist(empty_folder):
    """A small MNIST of synthetic digits in ./data: 250 training and 130 test images."""
    RAW.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for split, count in (("train", 250), ("t10k", 130)):
        images, labels = common.draw_digits(count, generator)
        write_idx(RAW / f"{split}-images-idx3-ubyte", images)
        write_idx(RAW / f"{split}-labels-idx1-ubyte", labels.byte())


Run = namedtuple("Run", "model evaluation output")
Failure = namedtuple("Failure", "status message output")


@pytest.fixture
def train(small_mnist, capsys):
    """A function that calls a script's main(); the last one of repeated options counts."""

    def train(script, options="", *network_and_data):
        found = script.main(f"--device cpu {options}", *network_and_data)
        return Run(*found, capsys.readouterr().out)

    return train


@pytest.fixture
def fail(small_mnist, capsys):
    """A function that runs a script, which has to end the program; returns how it ended."""

    def fail(script, options="", *network_and_data):
        with raises(SystemExit) as ended:
            common.run(lambda: script.main(f"--device cpu {options}", *network_and_data))
        code = ended.value.code
        output, errors = capsys.readouterr()
        if isinstance(code, str):  # Python prints it, and exits with status 1
            return Failure(1, code, output)
        return Failure(code, errors.strip(), output)

    return fail


@pytest.fixture
def file(empty_folder):
    """A file of a former run, under a name that fits each option."""
    file = Path("results.png")
    file.write_text("of a former run")
    return file


def start(script, options, **variables):
    """Start a script in a subprocess, with Python's usual buffering."""
    command = [sys.executable, script.__file__, "--device", "cpu", *options.split()]
    env = {**os.environ, "PYTHONUNBUFFERED": "", **variables}
    return subprocess.Popen(command, text=True, env=env, stdout=PIPE, stderr=PIPE)


def spy(monkeypatch, owner, name):
    """Let owner.name work as before; return a list that gathers the arguments of its calls."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def interrupt(*args):
    raise KeyboardInterrupt


def numbers_after(word, output):
    """The numbers that are printed after `word: `."""
    return [float(number) for number in re.findall(rf"{word}: (\d\S*\d)", output)]


def same_weights(model, other):
    """Whether all weights and buffers are the same, bit for bit."""
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def assert_one_line(failure, start, end=""):
    assert failure.status == 1
    assert failure.message.startswith(start)
    assert failure.message.endswith(end)
    assert "\n" not in failure.message


def parse(options):
    return common.parse_args(common.make_parser("", 0.01), f"--device cpu {options}")


def load_data(options):
    return common.load_data(parse(options))


# ---- the bugs of the tutorial, in the order of the README ----


def test_bug_softmax_before_cross_entropy_loss(script, train):
    """If softmax is applied twice, the loss of ten classes stays above ln(e + 9) - 1 = 1.46."""
    memorized = train(script, "--limit 10 --epochs 120 --lr 0.003")
    assert numbers_after("Loss", memorized.output)[-1] < 0.5


def test_bug_classifier_input_size():
    """The tutorial's layers fit together if the convolutions keep the size of the image."""
    cnn, images = CNN(), torch.rand(3, 1, 28, 28)
    x = F.max_pool2d(cnn.conv1(images).relu(), 2)
    x = F.max_pool2d(cnn.conv2(x).relu(), 2)
    assert x.shape == (3, 32, 7, 7)
    assert torch.allclose(cnn(images), cnn.fc(x.flatten(1)), atol=1e-5)


@parametrize("network", [CNN, RNN])
def test_bug_batch_taken_for_time(network, device):
    """If the batch is treated as time, the output for an image depends on the images before it."""
    model, images = network().to(device), torch.rand(5, 1, 28, 28, device=device)
    one_by_one = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), one_by_one, atol=1e-3)  # a GPU may round to TF32


def test_bug_last_batch_row_taken_for_last_time_step():
    """The output comes from the last layer's state after the last row of the image."""
    model, images = RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(images.squeeze(1))  # (2, 3, 128)
    assert torch.allclose(model(images), model.fc(hidden[-1]), atol=1e-6)


OUTPUT = r"""Device: cpu, Model: (CNN \(20,490|RNN \(214,282) parameters\), Data: mnist .*, 130 .*
Epoch \[1/2\], Step \[3/3\], Loss: \d\.\d{4}
Epoch \[1/2\], Test loss: \d\.\d{4}, Test accuracy: \d+\.\d\d%, Time: \d+\.\d\d s
Epoch \[2/2\], Step \[3/3\], Loss: \d\.\d{4}
Epoch \[2/2\], Test loss: \d\.\d{4}, Test accuracy: \d+\.\d\d%, Time: \d+\.\d\d s
Training finished.
Class        Precision    Recall        F1     Count
0 """


def test_bug_undefined_names(script, small_mnist):
    """The script runs from start to end, and prints its progress."""
    process = start(script, "--epochs 2")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert re.match(OUTPUT, output)


def test_bug_test_set_never_evaluated(script, train):
    """The test loss and accuracy are those of the trained network on the test images."""
    run = train(script, "--epochs 2 --lr 0.003")
    test = datasets.MNIST("data", train=False)
    logits = run.model(test.data[:, None] / 255)
    loss = F.cross_entropy(logits, test.targets).item()
    accuracy = (logits.argmax(dim=1) == test.targets).float().mean().item()
    assert numbers_after("Test loss", run.output)[-1] == approx(loss, abs=1e-4)
    assert numbers_after("Test accuracy", run.output)[-1] == approx(100 * accuracy, abs=0.01)


@parametrize(("size", "steps"), [(100, "3/3"), (125, "2/2"), (1000, "1/1"), (2, "100/125 125/125")])
def test_bug_steps_counted_without_the_last_batch(script, size, steps, train):
    """250 images are three steps of 100, because the last, incomplete batch is a step, too."""
    run = train(script, f"--epochs 1 --batch-size {size}")
    assert re.findall(r"Step \[(.*)\]", run.output) == steps.split()


# ---- training ----


def test_smoke_one_batch(script, device, train):
    before = train(script, f"--device {device} --epochs 0").model
    after = train(script, f"--device {device} --epochs 1 --limit 100").model
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert not torch.equal(old, new)


def test_defaults_train_as_the_tutorial_does(script, train):
    assert parse("").batch_size == 100
    trained = train(script, "--epochs 2 --log log.csv")
    model = train(script, "--epochs 0").model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loader, losses = load_data("").train_loader, []
    for images, labels in itertools.chain(loader, loader):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert numbers_after("Loss", trained.output) == approx(losses[2::3], abs=2e-4)
    means = [float(row.split(",")[1]) for row in Path("log.csv").read_text().splitlines()[1:]]
    assert means == approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], abs=1e-4)
    for mine, theirs in zip(model.parameters(), trained.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@parametrize("option", ["", "--one-cycle", "--augment"])
def test_same_seed_same_weights(script, device, option, train):
    options = f"--epochs 2 --limit 100 --batch-size 32 --device {device} {option}"
    model = train(script, options).model
    assert same_weights(model, train(script, options).model)
    assert not same_weights(model, train(script, f"{options} --seed 1").model)


def test_a_learning_rate_of_0_changes_nothing(train):
    before, after = (train(cnn_mnist, f"--epochs {n} --lr 0").model for n in (0, 1))
    assert same_weights(before, after)


@parametrize(
    ("script", "options", "peak"),
    [(cnn_mnist, "--augment", 0.01), (rnn_mnist, "", 0.005), (rnn_mnist, "--lr 0.002", 0.002)],
)
def test_one_cycle_peaks_after_30_percent_of_the_steps(script, options, peak, train):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: rates.append(adam.param_groups[0]["lr"])
    )
    train(script, f"--one-cycle --epochs 10 {options}")  # 30 steps; the ninth has the peak
    hook.remove()
    assert [rates[0], rates[8], rates[-1]] == approx([peak / 25, peak, peak / 250_000])


def test_augment_moves_the_training_images_and_no_test_image(script, train, monkeypatch):
    plain = train(script, "--epochs 1").model
    calls = spy(monkeypatch, common, "random_affine")
    assert not same_weights(plain, train(script, "--epochs 1 --augment").model)
    assert sum(len(images) for (images,), _ in calls) == 250
    assert calls[0][1] == {"shift": 1 if script is cnn_mnist else 2}


def test_random_affine_works_in_pixels(device):
    """It rotates, scales and shifts by up to 10 degrees, 10% and 2 pixels, and does not shear.

    Each pixel of these images holds its own position, so the result says where it came from.
    """
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(60.0), indexing="ij")
    images = torch.stack([1 + x, 1 + y]).expand(5000, 2, 20, 60).to(device)  # 0 is outside
    moved = common.random_affine(images).cpu()
    here, right, below = moved[:, :, 9, 29], moved[:, :, 9, 30], moved[:, :, 10, 29]
    cos, sin = (right - here).T
    assert torch.allclose(below - here, torch.stack([-sin, cos], dim=1), atol=1e-3)
    assert torch.atan2(sin, cos).rad2deg().aminmax() == approx((-10, 10), abs=0.1)
    assert torch.hypot(sin, cos).reciprocal().aminmax() == approx((0.9, 1.1), abs=0.001)
    shift = (right + below) / 2 - torch.tensor([30.5, 10.5])  # of the centre of the image
    assert shift.abs().amax(dim=0).tolist() == approx([2, 2], abs=0.01)
    assert moved.amin(dim=(2, 3)).median() == 0  # most images show something of the outside


@parametrize("options", ["", "--one-cycle --augment"])
def test_a_step_neither_waits_for_the_device_nor_copies(script, device, options, train):
    def count(batch_size):
        with torch.profiler.profile() as profile:
            train(script, f"--device {device} --epochs 1 --batch-size {batch_size} {options}")
        # The calls of the scripts, not those within torch; `to` calls `_to_copy` if it has to copy.
        events = [event for event in profile.events() if event.cpu_parent is None]
        called = [part.name for event in events for part in (event, *event.cpu_children)]
        return [called.count(f"aten::{name}") for name in ("item", "is_nonzero", "_to_copy")]

    assert count(250) == count(130)  # 1 and 2 steps; the last one is printed


def test_each_epoch_has_a_new_order_that_only_the_seed_decides(small_mnist):
    def order(loader):
        return torch.cat([labels for _, labels in loader]).tolist()

    first, same, other = (load_data(f"--seed {seed}").train_loader for seed in (0, 0, 1))
    epochs = [order(first), order(first)]
    torch.rand(3)  # advances the global generator
    assert [order(same), order(same)] == epochs
    assert epochs[0] != epochs[1]
    assert epochs[0] != order(other)
    assert sorted(epochs[0]) == sorted(first.labels.tolist())


def test_limit_takes_the_first_images_and_validate_the_last_ones(small_mnist):
    full, data = load_data("").train_loader, load_data("--limit 7 --validate 240")
    assert torch.equal(data.train_loader.images, full.images[:7])
    assert torch.equal(data.eval_loader.images, full.images[10:])
    assert torch.equal(data.eval_loader.labels, full.labels[10:])


def test_no_training_images_left_is_an_error_before_training(fail):
    says = "error: no samples in a loader; use a smaller --validate, or more data"
    assert fail(cnn_mnist, "--validate 250") == (1, says, "")


def test_synthetic_digits_do_not_leak_and_are_the_same_for_each_seed():
    data, same = (load_data(f"--dataset synthetic --seed {seed}") for seed in (0, 1))
    images, test = data.train_loader.images, data.eval_loader.images
    assert torch.equal(images, same.train_loader.images)
    assert torch.equal(test, same.eval_loader.images)
    assert len(torch.cat([images, test]).flatten(1).unique(dim=0)) == 70_000


def test_synthetic_digits_are_learned(capsys):
    options = "--dataset synthetic --limit 30000 --epochs 1 --batch-size 50 --one-cycle"
    rnn_mnist.main(f"{options} --device {DEVICES[-1]}")
    assert numbers_after("accuracy", capsys.readouterr().out)[0] > 90


MNIST = HERE / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST.is_file(), reason="MNIST is not in ./data")
def test_real_mnist_is_learned(capsys):
    cnn_mnist.main(["--data-dir", HERE / "data", "--epochs", 1, "--device", DEVICES[-1]])
    assert numbers_after("accuracy", capsys.readouterr().out)[0] > 95


# ---- where it runs ----


def test_an_import_changes_nothing():
    program = """if True:
        import ctypes, os, sys, torchvision
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # another test may have set it
        from torch import backends, initial_seed
        def state():
            settings = backends.cudnn.deterministic, initial_seed(), sys.stdout.line_buffering
            return dict(os.environ), settings
        before = state()
        ctypes.CDLL = None  # a call of mallopt would fail
        import cnn_mnist, rnn_mnist
        assert before == state()
    """
    subprocess.run([sys.executable, "-c", program], cwd=HERE, check=True)


def test_a_notebook_shows_an_error_as_one_line_and_goes_on(script, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # like a notebook's, no TextIOWrapper
    with raises(UserError) as raised:
        common.run(lambda: script.main(["--seed", 3, "--device", "cpu", "--load", "gone.pt"]))
    (line,) = raised.value._render_traceback_()
    assert line.startswith("error: cannot load gone.pt ([Errno 2] No such file")


@parametrize(
    ("program", "has_file", "epochs"),
    [
        ("mine.py", True, 3),
        ("/usr/lib/colab_kernel_launcher.py", True, 10),
        ("pydevconsole.py", True, 10),
        ("any_other_console.py", False, 10),
    ],
)
def test_a_program_has_options_and_a_console_keeps_its_own(program, has_file, epochs, monkeypatch):
    main = SimpleNamespace(__file__=program) if has_file else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [program, "--epochs", "3"])
    monkeypatch.setattr(common, "find_device", str)
    assert common.parse_args(common.make_parser("", 0.01), None).epochs == epochs


def test_another_default_device_does_not_matter():
    with torch.device("meta"):
        loader = load_data("--dataset synthetic").train_loader
        images, _ = next(iter(loader))
    assert images.device.type == "cpu"


def test_a_mistake_in_the_program_keeps_its_traceback():
    with raises(FileNotFoundError):  # an OSError, as a closed pipe is
        common.run(lambda: os.stat("missing"))


@pytest.fixture(params=["", "1"])
def process(request, small_mnist):
    """A run that has printed two lines. Without line buffering, they would arrive at the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
    options = "--batch-size 1 --epochs 30"
    with start(cnn_mnist, options, PYTHONUNBUFFERED=request.param) as process:
        assert process.stdout.readline().startswith("Device")
        assert "Step [100/250]" in process.stdout.readline()
        yield process


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c(process):
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "Interrupted.\n"
    assert process.wait() == 130


def test_a_closed_pipe(process):
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_a_letter_that_the_terminal_cannot_print_becomes_a_question_mark(script, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    script.main("--epochs 1 --device cpu", flat(4), own_data([4], ["Größe", "葉", "c"]))
    assert "\n?  " in terminal.buffer.getvalue().decode("cp1252")


WRONG_OPTIONS = [
    *("--epochs x", "--device gpu", "--batch-size 0", "--limit 0", "--hidden 0"),
    *("--errors mistakes.jpg", "--predict 7.png", "--predict 7.png --load w.pt --dataset kmnist"),
    "--predict 7.png --load w.pt --dataset fashion-mnist",
]


@parametrize("options", WRONG_OPTIONS)
def test_a_wrong_option_is_named(options, fail):
    failure = fail(rnn_mnist, options)
    assert failure.status == 2
    assert f"error: argument {options.split()[0]}: " in failure.message


def test_help_groups_the_options(script, fail):
    page = fail(script, "--help")
    assert page.status == 0
    assert re.search(r"(?s)\n\ntraining:\n.*\n\ndata:\n.*\n\nresults:\n", page.output)


def test_device_auto_is_the_accelerator_otherwise_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert parse("--device auto").device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    with raises(argparse.ArgumentTypeError, match="meta cannot be used"):
        common.find_device("auto")


def test_a_device_that_fails_is_one_line(monkeypatch):
    def ones(size, device):
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")

    monkeypatch.setattr(torch, "ones", ones)
    says = "^cuda:9 cannot be used: CUDA error: invalid device ordinal; try --device cpu$"
    with raises(argparse.ArgumentTypeError, match=says):
        common.find_device("cuda:9")


# ---- own network and own data ----


def flat(inputs, outputs=3):
    layers = nn.BatchNorm1d(inputs), nn.Dropout(), nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Flatten(), *layers)


def own_loader(count, shape, **options):
    samples = TensorDataset(torch.randn(count, *shape), torch.arange(count) % 3)
    return DataLoader(samples, 8, **options)


def own_data(shape, classes):
    """60 training and 30 test samples of three classes."""
    return common.Data(own_loader(60, shape), own_loader(30, shape), classes)


class Own(nn.Module):
    """Uses view, as most tutorials do; false in `model or CNN()`, because its length is 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 26 * 26, 10)

    def __len__(self):
        return 0

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_a_network_is_taken_as_it_is_and_trained_in_place(script, device, train):
    mine = Own()
    mine.conv.requires_grad_(False)
    conv, fc = mine.conv.weight.clone(), mine.fc.weight.clone()
    run = train(script, f"--device {device} --epochs 1", mine)
    assert run.model is mine
    assert "Model: Own (27,090 parameters)" in run.output  # 10 * 2,705 + 40
    assert torch.equal(mine.conv.weight.cpu(), conv)
    assert not torch.equal(mine.fc.weight.cpu(), fc)


def test_each_epoch_trains_in_training_mode(script, train):
    """Also if the network comes in evaluation mode; it is returned in evaluation mode."""
    mine, calls = Own().eval(), []
    mine.register_forward_hook(lambda _, inputs, out: calls.append((mine.training, len(out))))
    train(script, "--epochs 2 --batch-size 90", mine)
    assert calls == [(True, 90), (True, 90), (True, 70), (False, 90), (False, 40)] * 2
    assert not mine.training


def test_a_class_is_called_after_the_seed_is_set(script, train):
    first, same = (train(script, "--epochs 0", Own).model for _ in range(2))
    assert same_weights(first, same)


def test_hidden_and_layers_shape_the_lstm(train):
    lstm = train(rnn_mnist, "--epochs 0 --hidden 8 --layers 3").model.lstm
    assert (lstm.hidden_size, lstm.num_layers) == (8, 3)


@parametrize("shape", [(3, 32, 32), (12, 5)])  # colour images, and sequences
def test_own_data_is_reported_with_its_own_names(script, shape, device, train):
    names = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"]
    network, data = flat(math.prod(shape)), own_data(shape, names)
    run = train(script, f"--device {device} --epochs 1 --errors e.png", network, data)
    assert "Data: custom data (60 training samples, 30 test samples)\n" in run.output
    assert "mnist" not in run.output
    for name in names:
        assert re.search(rf"\n{name} .* 10\n", run.output)
    assert run.output.splitlines()[-5].split() == names  # above the matrix, whole


@parametrize(
    ("options", "words"),
    [
        ({"batch_size": 8, "sampler": SubsetRandomSampler(range(45))}, "45 training samples"),
        ({"batch_size": 8, "drop_last": True}, "56 training samples"),
        ({"batch_sampler": [[0, 1], [2]]}, "2 training batches"),
    ],
)
def test_the_header_counts_what_a_loader_yields(options, words):
    assert common.describe(DataLoader(range(60), **options), "training") == words


def test_wrong_own_data_is_an_error_when_it_is_made():
    full, empty = own_loader(60, [4]), own_loader(60, [4], sampler=SubsetRandomSampler([]))
    with raises(UserError, match="no samples in a loader"):
        common.Data(full, empty, ["a", "b", "c"])
    with raises(TypeError, match="not iterable"):
        common.Data(full, full, 3)


@parametrize("options", ["--limit 10", "--validate 10", "--batch-size 8", "--errors e.png"])
def test_options_that_do_not_fit_own_data_are_refused(options, fail):
    shuffled = own_loader(60, [4], shuffle=True)
    failure = fail(cnn_mnist, options, flat(4), common.Data(shuffled, shuffled, "abc"))
    assert (failure.status, failure.output) == (2, "")
    shuffles = options == "--errors e.png"
    advice = "must not shuffle the images" if shuffles else "batch your own data yourself"
    assert failure.message.endswith(advice)


@parametrize("outputs", [2, 4])
def test_each_output_has_a_name_or_a_number(outputs, capsys):
    args, data = SimpleNamespace(epochs=1, errors=None), SimpleNamespace(classes=["a", "b", "c"])
    common.report(args, data, SimpleNamespace(confusion=torch.eye(outputs).long()))
    header = capsys.readouterr().out.splitlines()[-outputs - 1]
    assert header.split() == ["a", "b", "c", "3"][:outputs]


def test_many_outputs_print_no_tables(train):
    run = train(cnn_mnist, "--epochs 1", flat(4, 51), own_data([4], "abc"))
    assert "\nNo tables of 51 outputs;" in run.output


# ---- evaluate and report ----


def identity(count):
    """A network whose logits are its inputs (N, count)."""
    model = nn.Sequential(nn.Linear(count, count, bias=False), nn.Dropout())
    nn.init.eye_(model[0].weight)
    return model


def test_evaluate_computes_each_figure(device):
    model = identity(2).to(device)
    logits = 3 * torch.eye(2)[[0, 1, 0, 1]]
    labels = torch.tensor([0, 0, 0, 1])
    loader = DataLoader(TensorDataset(logits, labels), 3)
    evaluation = common.evaluate(model, loader)
    assert evaluation.loss == approx(0.79859, abs=1e-4)  # (3 ln(1 + e^-3) + ln(1 + e^3)) / 4
    assert evaluation.accuracy == 0.75
    assert evaluation.confusion.tolist() == [[2, 1], [0, 1]]
    assert torch.equal(evaluation.logits, logits)
    assert torch.equal(evaluation.labels, labels)
    assert not evaluation.logits.requires_grad
    assert all(module.training for module in model.modules())  # as before
    common.evaluate(model.eval(), loader)
    assert not model.training


def test_evaluation_does_not_change_the_training(script, train, monkeypatch):
    model = train(script, "--epochs 2 --augment").model
    nothing = SimpleNamespace(loss=0, accuracy=0, confusion=torch.zeros(10, 10))
    monkeypatch.setattr(common, "evaluate", lambda *args: nothing)
    assert same_weights(model, train(script, "--epochs 2 --augment").model)


THREE_CLASSES = """\
Class        Precision    Recall        F1     Count
cat             0.8889    0.8000    0.8421        10
dog             0.8182    0.9000    0.8571        10
cow             0.0000    0.0000    0.0000         0
Confusion matrix (rows: true classes, columns: predicted classes):
                     cat         dog         cow
cat                    8           2           0
dog                    1           9           0
cow                    0           0           0
"""  # of 10 cats, 2 are predicted as dogs; F1 of cats: 16/19

FASHION = """\
Confusion matrix (rows: true classes, columns: predicted classes):
              T-shi Trous Pullo Dress  Coat Sanda Shirt Sneak   Bag Ankle
"""


def test_tables_of_three_classes(capsys):
    confusion = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])  # no sample of the third class
    common.print_tables(confusion, ["cat", "dog", "cow"])
    assert capsys.readouterr().out == THREE_CLASSES


def test_tables_of_long_names_and_large_counts(capsys):
    common.print_tables(torch.full((10, 10), 10**6), datasets.FashionMNIST.classes)
    output = capsys.readouterr().out
    assert FASHION in output
    assert output.endswith(" 1000000 1000000\n")


@parametrize(
    ("name", "folder", "classes"),
    [
        ("mnist", "MNIST", list("0123456789")),
        ("fashion-mnist", "FashionMNIST", datasets.FashionMNIST.classes),
        ("kmnist", "KMNIST", datasets.KMNIST.classes),
    ],
)
def test_report_is_that_of_the_last_evaluation(name, folder, classes, train):
    Path("data/MNIST").rename(f"data/{folder}")
    run = train(cnn_mnist, f"--dataset {name} --epochs 2 --lr 0.003")
    matrix = zip(classes, run.evaluation.confusion.tolist(), strict=True)
    rows = [[*name.split(), *map(str, counts)] for name, counts in matrix]
    assert [line.split() for line in run.output.splitlines()[-10:]] == rows


def test_zero_epochs_only_evaluate(script, train):
    run = train(script, "--epochs 0 --one-cycle")
    header, scores, *_ = run.output.splitlines()
    assert header.endswith("Data: mnist (130 test samples)")
    assert scores.startswith(f"Test loss: {run.evaluation.loss:.4f}, Test accuracy: ")


def test_validation_is_called_so(script, train):
    output = train(script, "--epochs 1 --validate 120 --log log.csv").output
    assert "mnist (130 training samples, 120 validation samples)" in output
    assert "Validation loss: " in output
    assert "Test" not in output
    head = "epoch,train_loss,validation_loss,validation_accuracy,seconds"
    assert Path("log.csv").read_text().startswith(head)


def test_each_epoch_is_logged_and_saved(script, train, file, monkeypatch):
    saved = spy(monkeypatch, common, "save_weights")
    run = train(script, f"--epochs 2 --save weights.pt --log {file}")
    head, first, last = file.read_text().splitlines()
    assert head == "epoch,train_loss,test_loss,test_accuracy,seconds"
    assert first.startswith("1,")
    scores = f"{run.evaluation.loss:.6f},{run.evaluation.accuracy:.6f}"
    assert re.fullmatch(rf"2,\d\.\d{{6}},{scores},(\d+\.\d\d)", last)
    assert float(last.split(",")[-1]) == numbers_after("Time", run.output)[-1]
    assert len(saved) == 2


def test_time_is_that_of_training_until_the_gpu_has_finished(script, train, monkeypatch):
    """Each forward pass, each look at a value, and each look at the clock takes a second."""
    clock, item = itertools.count(), torch.Tensor.item

    def tick(*args):
        next(clock)

    mine = Own()
    mine.register_forward_hook(tick)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: tick() or item(tensor))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    run = train(script, "--epochs 2", mine)
    # three steps, the last one's loss, the mean loss, and the clock at the end; not the evaluation
    assert numbers_after("Time", run.output) == [6, 6]


@parametrize(("lr", "eval_loss"), [(1e37, 0.5), (0.001, math.inf)])
def test_a_loss_that_is_not_finite_saves_nothing(script, lr, eval_loss, fail, file, monkeypatch):
    """In training, or in the evaluation."""
    monkeypatch.setattr(common, "evaluate", lambda *_: SimpleNamespace(loss=eval_loss))
    failure = fail(script, f"--save {file} --log log.csv --lr {lr}")
    advice = "try a smaller --lr, or look for values in the data that are not finite"
    assert failure[:2] == (1, f"error: the loss is not finite; {advice}")
    assert file.read_text() == "of a former run"
    assert not Path("log.csv").exists()


def draw(images, logits, labels, names=("zero", "one")):
    """The sheet of errors, uint8 (3, H, W), of images (N, C, H, W) with these logits (N, 2)."""
    evaluation = SimpleNamespace(logits=logits, labels=torch.tensor(labels))
    loader = DataLoader(TensorDataset(images, evaluation.labels), 50)
    common.draw_errors("e.png", evaluation, loader, names)
    return pil_to_tensor(Image.open("e.png"))


def test_errors_most_confident_first(capsys):
    """Each image has one level of grey, which is also how confident the network is."""
    levels = torch.linspace(0, 1, 130)
    labels = [0] + [1] * 129  # only the first prediction is right
    images = levels.view(130, 1, 1, 1).expand(130, 1, 28, 28)
    sheet = draw(images, torch.stack([levels, -levels], dim=1), labels)
    drawn = sheet[0, 40::140, 40::120].flatten() / 255
    assert torch.allclose(drawn, levels.flip(0)[:100], atol=0.01)
    assert capsys.readouterr().out == "e.png shows 100 of 129 mistakes.\n"


def test_errors_are_labelled_with_names_that_the_font_can_draw_and_that_fit(monkeypatch):
    texts = spy(monkeypatch, ImageDraw.ImageDraw, "text")
    logits = torch.tensor([[2.0, 1], [3, 1], [0, 2]])  # the second one is right
    draw(torch.rand(3, 1, 8, 8), logits, [1, 0, 0], ["Größe", "WALKING_UPSTAIRS"])
    assert [text for (_, _, text, *_), _ in texts] == [
        "true: WALKING_UPST\npred: 0\n73.1% sure",  # e / (e + 1)
        "true: 0\npred: WALKING_UPST\n88.1% sure",  # e^2 / (e^2 + 1)
    ]


def test_errors_in_colour():
    image = torch.zeros(1, 3, 14, 28)
    image[:, 0] = 1  # red above
    image[:, 1, 7:] = 0.5  # orange below
    sheet = draw((image - 0.5) / 0.25, torch.tensor([[1.0, 0]]), [1])  # standardized
    assert sheet[:, [10, 32], 62].T.tolist() == [[255, 0, 0], [255, 127, 0]]


def test_errors_need_one_batch_at_a_time_in_the_order_of_the_evaluation(monkeypatch):
    drawn, counts = spy(monkeypatch, ImageOps, "contain"), []

    def batches():
        for label in (0, 0, 1):
            yield torch.rand(1, 8, 8), torch.tensor([label])
            counts.append(len(drawn))

    evaluation = SimpleNamespace(logits=torch.eye(2)[[1, 1, 1]], labels=torch.zeros(3))
    with raises(UserError, match="eval_loader must not shuffle"):  # the third label differs
        common.draw_errors("e.png", evaluation, batches(), ["zero", "one"])
    assert counts == [1, 2]
    assert not Path("e.png").exists()


# ---- files ----


CNN_WEIGHTS = CNN().state_dict()


def test_saved_weights_are_loaded(script, device, train, file):
    """Those of this network include the buffers of BatchNorm."""
    saved = train(script, f"--device {device} --epochs 2 --save {file}", flat(784, 10))
    loaded = train(script, f"--device {device} --epochs 0 --load {file}", flat(784, 10))
    assert same_weights(saved.model, loaded.model)


def test_saved_weights_are_a_plain_state_dict_on_the_cpu(device, train, file):
    trained = train(cnn_mnist, f"--device {device} --epochs 1 --save {file}").model
    weights = torch.load(file)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert all(tensor.is_contiguous() for tensor in weights.values())  # in the ordinary format
    plain = CNN()
    plain.load_state_dict(weights)
    assert same_weights(plain, trained.cpu())


def test_weights_that_somebody_saved_on_a_gpu_are_loaded(train, file, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    torch.save(CNN_WEIGHTS, file)
    loaded = train(cnn_mnist, f"--epochs 0 --load {file}").model
    assert torch.equal(loaded.fc.weight, CNN_WEIGHTS["fc.weight"])


class Harmful:
    """Makes the folder `trace` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_loading_runs_no_code(fail, file, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as torch.load's default
    torch.save({"weights": Harmful()}, file)
    assert fail(cnn_mnist, f"--load {file}").status == 1
    assert not Path("trace").exists()


OTHER_WEIGHTS = {
    "text": b"seven is a digit",
    "empty": b"",
    "checkpoint": {"weights": CNN_WEIGHTS},
    "hidden": RNN(16).state_dict(),
}


@parametrize("content", OTHER_WEIGHTS)
def test_other_weights_are_refused(script, content, fail, file):
    weights = OTHER_WEIGHTS[content]
    if isinstance(weights, bytes):
        file.write_bytes(weights)
    else:
        torch.save(weights, file)
    failure = fail(script, f"--load {file}")
    start = f"error: cannot load {file} ("
    assert_one_line(failure, start, "N, with layers of the same size")  # CNN or RNN


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full to write to")
def test_a_full_disk_keeps_the_file(fail, file):
    os.symlink("/dev/full", f"{file}.part")
    os.symlink(file, "link")  # the file itself is written, not the link
    failure = fail(cnn_mnist, "--epochs 1 --save link")
    says = "error: cannot write link: [Errno 28] No space left on device; "
    assert_one_line(failure, says, "choose another path")
    assert file.read_text() == "of a former run"
    assert not os.path.lexists(f"{file}.part")


def test_an_interrupt_while_saving_keeps_the_file_and_logs_nothing(fail, file, monkeypatch):
    monkeypatch.setattr(torch, "save", interrupt)
    failure = fail(cnn_mnist, f"--save {file} --log log.csv")
    assert failure[:2] == (130, "Interrupted.")
    assert file.read_text() == "of a former run"
    assert sorted(os.listdir()) == ["data", file.name]


@parametrize("option", ["--save", "--log", "--errors"])
@parametrize("place", ["folder.png", "missing/file.png", "protected/file.png"])
def test_a_bad_place_is_an_error_before_training(option, place, fail, monkeypatch):
    os.mkdir("folder.png")
    os.mkdir("protected")
    # The superuser may write everywhere, so a real protection has no effect in a container.
    monkeypatch.setattr(
        os, "access", lambda path, _: os.path.isdir(path) and "protected" not in path
    )
    why = "it is a folder, or its folder does not exist or is write-protected; choose another path"
    assert fail(cnn_mnist, f"{option} {place}") == (1, f"error: cannot write {place}: {why}", "")


@parametrize("place", ["empty", "data/MNIST/raw/train-labels-idx1-ubyte"])
def test_missing_data_is_one_line(place, fail, monkeypatch):
    os.mkdir("empty")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    failure = fail(cnn_mnist, f"--data-dir {place}")
    start = f"error: cannot read or download {Path(place) / 'MNIST/raw'}: "
    assert_one_line(failure, start, "; without internet access, use --dataset synthetic")
    assert ("Error downloading" in failure.message) == (place == "empty")


def test_damaged_data_is_one_line_and_stays(fail):
    damaged = RAW / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:100])
    failure = fail(rnn_mnist)
    assert_one_line(failure, f"error: cannot read or download {RAW}: ")
    assert "after an interrupted download, move that folder away" in failure.message
    assert damaged.stat().st_size == 100


# ---- pictures of your own ----


def draw_page(digit):
    """A picture of one digit, dark on light, not in the middle."""
    picture = Image.new("L", (500, 400), 255)
    ImageDraw.Draw(picture).text((250, 120), str(digit), fill=0, font_size=200)
    return picture


def read(page):
    page.save("page.png")
    return common.read_picture("page.png")


def on_a_table(page):
    table = ImageOps.expand(Image.new("L", (400, 350), 255), (100, 0, 0, 50), fill=90)
    return ImageChops.multiply(page, table)


def with_grain(page, sigma=40):
    noise = torch.randn(page.size[::-1], generator=torch.Generator().manual_seed(0))
    return to_pil_image((pil_to_tensor(page) + sigma * noise).clamp(0, 255).byte())


def on_dark_coloured_paper(page):
    return with_grain(ImageOps.colorize(page, "khaki", "darkslategray"))


def on_dark_grey_paper(page):
    return page.point(lambda x: 20 + x * 80 // 255)


def with_a_thin_pencil(page):
    return with_grain(page.filter(ImageFilter.MaxFilter(9)).point(lambda x: 100 + x // 2), 10)


def dark_on_transparency(page, level=0):
    return Image.merge("LA", (Image.new("L", page.size, level), ImageOps.invert(page)))


def light_on_transparency(page):
    return dark_on_transparency(page, 255)


def cut_out(page):
    return page.crop(ImageOps.invert(page).getbbox())


def with_a_thick_felt_pen_cut_out(page):
    return cut_out(page.filter(ImageFilter.MinFilter(9)))


PENS = [with_a_thin_pencil, with_a_thick_felt_pen_cut_out]
FORMS = [
    on_a_table,
    on_dark_coloured_paper,
    on_dark_grey_paper,
    dark_on_transparency,
    light_on_transparency,
    cut_out,
    *PENS,
]


@parametrize(("form", "digit"), [*itertools.product(FORMS, [2, 4, 7]), (cut_out, 1)])
def test_a_picture_of_any_form_is_read_like_a_plain_one(form, digit):
    plain, other = read(draw_page(digit)), read(form(draw_page(digit)))
    assert 0.06 < other.mean() < 0.18  # near MNIST's 0.1307, for thin and for thick pens
    # Another pen changes up to 0.6 of the ink, other paper 0.4, and another digit more than 1.
    most = 0.6 if form in PENS else 0.4
    assert (plain - other).abs().sum() < most * plain.sum()


def test_a_photo_is_rotated_as_its_camera_says():
    page = draw_page(7)
    exif = page.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    page.transpose(Image.Transpose.ROTATE_90).save("7.jpg", exif=exif)
    plain, other = read(page), common.read_picture("7.jpg")
    assert (plain - other).abs().sum() < 0.1 * plain.sum()


def test_a_second_stroke_is_kept_and_a_speck_and_the_border_are_not():
    ink = torch.zeros(64, 96)
    ink[20:44, 20:28] = 1  # a stroke
    ink[20:32, 40:48] = 1  # half as much ink
    kept = ink.clone()
    ink[52:56, 52:56] = 1  # a speck, with 1/12 of the ink
    ink[:, 80:] = 1  # a table at the border
    assert torch.equal(common.main_components(ink), kept)


def test_the_longer_side_of_a_picture_becomes_256_pixels(monkeypatch):
    calls = spy(monkeypatch, common, "find_ink")
    common.mnist_form(255 * torch.rand(400, 200))
    assert calls[0][0][0].shape == (256, 128)


def test_a_digit_is_upright_and_where_mnist_has_it():
    page = Image.new("L", (300, 400), 255)
    ImageDraw.Draw(page).line(((100, 50), (100, 250), (180, 250)), fill=0, width=20)  # an L
    image = read(page)[0]
    assert 18 <= (image.amax(dim=1) > 0.25).sum() <= 20  # rows with ink
    assert image[:14, 15:].max() < 0.01  # nothing at the top right
    for axis in (0, 1):
        mass = image.sum(dim=axis) / image.sum()
        assert mass @ torch.arange(28.0) == approx(14, abs=0.3)


def test_predict_prints_the_digit_and_its_probability(script, device, train, file):
    """The network of this test has dropout, so it has to be in evaluation mode."""
    model = train(script, f"--epochs 2 --save {file}", flat(784, 10)).model
    image = read(draw_page(7))
    logits = model.to(device)(image[None].to(device))
    probability, label = logits.softmax(dim=1)[0].max(dim=0)
    options = f"--dataset synthetic --device {device} --load {file} --predict page.png"
    run = train(script, options, flat(784, 10))
    assert run.output == f"page.png: {label} ({probability:.1%})\n"
    assert run.evaluation is None


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(fail):
    torch.save(CNN_WEIGHTS, "weights.pt")
    draw_page(2).save("good.png")
    Path("text.png").write_text("seven")
    with_grain(Image.new("L", (300, 200), 240), 4).save("blank.png")
    pictures = "gone.png text.png blank.png good.png"
    failure = fail(cnn_mnist, f"--load weights.pt --predict {pictures}")
    assert failure.status == 1
    assert failure.output.startswith("good.png: ")
    for reason in ("gone.png: [Errno 2]", "text.png: cannot", "blank.png: no strokes"):
        assert f"cannot read a digit from {reason}" in failure.message
