"""Tests of the scripts, on the CPU and on the accelerator if there is one: python -m pytest

They need no internet access. A test on the real MNIST reads it from ./data, and is skipped if it
is not there.
"""

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
from torch.utils.data import DataLoader, TensorDataset
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
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)

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


def read_mnist(train=False):
    """The images (N, 1, 28, 28) in [0, 1] and labels (N,) of a split, as torchvision reads them."""
    split = datasets.MNIST("data", train)
    return split.data[:, None] / 255, split.targets


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
    """A function that runs a script that fails, in this process."""

    def fail(script, options=""):
        with raises(SystemExit) as ended:
            common.run(lambda: script.main(options))
        output, errors = capsys.readouterr()
        if isinstance(ended.value.code, str):  # Python prints it, and exits with status 1
            return Failure(1, ended.value.code, output)
        return Failure(ended.value.code, errors.strip(), output)

    return fail


each_file_option = parametrize("option", ["--save", "--log", "--errors"])


@pytest.fixture
def file(empty_folder):
    """A file of a former run, under a name that fits each option."""
    file = Path("results.png")
    file.write_text("of a former run")
    return file


def start(script, options, **variables):
    """Start a script in a subprocess, with Python's usual buffering."""
    command = [sys.executable, script.__file__, *options.split()]
    env = {**os.environ, "PYTHONUNBUFFERED": "", **variables}
    return subprocess.Popen(command, text=True, env=env, stdout=PIPE, stderr=PIPE)


def spy(monkeypatch, owner, name):
    """Let owner.name work as before; return a list that gathers the arguments of its calls."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def interrupt(*args):
    raise KeyboardInterrupt


def figures(output, word):
    """The numbers that are printed after `word: `."""
    return [float(number) for number in re.findall(rf"{word}: (\d\S*\d)", output)]


def weights(model):
    """All weights of a model, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same_weights(model, other):
    return torch.equal(weights(model), weights(other))


def assert_one_line(failure, start, end=""):
    assert failure.status == 1
    assert failure.message.startswith(start)
    assert failure.message.endswith(end)
    assert "\n" not in failure.message


def load_data(options):
    return common.load_data(common.parse_args(common.make_parser(""), f"--device cpu {options}"))


# ---- the bugs of the tutorial, in the order of the README's table ----


def test_bug_softmax_before_cross_entropy_loss(script, train):
    """If softmax is applied twice, the loss of ten classes stays above ln(e + 9) - 1 = 1.46."""
    memorized = train(script, "--limit 10 --epochs 120 --lr 0.003")
    assert figures(memorized.output, "Loss")[-1] < 0.5


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


def test_bug_undefined_names(script, small_mnist):
    """The script runs from start to end, and prints its progress."""
    process = start(script, "--epochs 2 --device cpu")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    header, first_step, _, _, epoch, end, *_ = output.splitlines()
    name = "CNN (20,490" if script is cnn_mnist else "RNN (214,282"
    data = "mnist (250 training and 130 test samples)"
    assert header == f"Device: cpu, Model: {name} parameters), Data: {data}"
    assert re.fullmatch(r"Epoch \[1/2\], Step \[3/3\], Loss: \d\.\d{4}", first_step)
    scores = r"Test loss: \d\.\d{4}, Test accuracy: \d+\.\d\d%, Time: \d+\.\d\d s"
    assert re.fullmatch(rf"Epoch \[2/2\], {scores}", epoch)
    assert end == "Training finished."


def test_bug_test_set_never_evaluated(script, train):
    """The test loss and accuracy are those of the trained network on the test images."""
    run = train(script, "--epochs 2 --lr 0.003")
    images, labels = read_mnist()
    logits = run.model.eval()(images)
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    assert figures(run.output, "Test loss")[-1] == approx(loss, abs=1e-4)
    assert figures(run.output, "Test accuracy")[-1] == approx(100 * accuracy, abs=0.01)


@parametrize(("size", "steps"), [(100, "3/3"), (125, "2/2"), (1000, "1/1"), (2, "100/125 125/125")])
def test_bug_steps_counted_without_the_last_batch(size, steps, train):
    """250 images are three steps of 100, because the last, incomplete batch is a step, too."""
    run = train(cnn_mnist, f"--epochs 1 --batch-size {size}")
    assert re.findall(r"Step \[(.*)\]", run.output) == steps.split()


# ---- training ----


def test_smoke_one_batch(script, device, train):
    before = train(script, f"--device {device} --epochs 0").model
    after = train(script, f"--device {device} --epochs 1 --limit 100").model
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_defaults_train_as_the_tutorial_does(script, train):
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
    assert figures(trained.output, "Loss") == approx(losses[2::3], abs=2e-4)
    means = [float(row.split(",")[1]) for row in Path("log.csv").read_text().splitlines()[1:]]
    assert means == approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], abs=1e-4)
    assert torch.allclose(weights(model), weights(trained.model), atol=1e-5)


SHORT = "--epochs 2 --limit 100 --batch-size 32"


@parametrize("option", ["", "--one-cycle", "--augment"])
def test_same_seed_same_weights(script, device, option, train):
    options = f"{SHORT} --device {device} {option}"
    model = train(script, options).model
    assert same_weights(model, train(script, options).model)
    assert not same_weights(model, train(script, f"{options} --seed 1").model)


@parametrize("option", ["--one-cycle", "--augment", "--lr 0.002", "--batch-size 30"])
def test_an_option_changes_the_weights(script, option, train):
    assert not same_weights(train(script, SHORT).model, train(script, f"{SHORT} {option}").model)


@parametrize(("option", "peak"), [("", 0.01), ("--lr 0.002", 0.002)])
def test_one_cycle_peaks_after_30_percent_of_the_steps(script, option, peak, train):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: rates.append(adam.param_groups[0]["lr"])
    )
    train(script, f"--one-cycle --epochs 10 {option}")  # 30 steps
    hook.remove()
    assert [rates[0], rates[8], rates[-1]] == approx([peak / 25, peak, peak / 250_000])
    assert rates == sorted(rates[:8]) + sorted(rates[8:], reverse=True)


def test_augment_moves_each_training_image_and_no_test_image(script, train, monkeypatch):
    calls = spy(monkeypatch, F, "affine_grid")
    train(script, "--augment --epochs 4")
    theta = torch.cat([theta for theta, _ in calls])
    assert len(theta.unique(dim=0)) == 4 * 250
    pixels = theta[:, :, 2].abs().amax(dim=0) * 28 / 2
    most = {cnn_mnist: 1, rnn_mnist: 2}[script]
    assert pixels.tolist() == approx([most, most], rel=0.02)


def test_random_affine_works_in_pixels(device, monkeypatch):
    """It rotates, scales and shifts by up to 10 degrees, 10% and 2 pixels, and does not shear."""
    calls = spy(monkeypatch, F, "affine_grid")
    moved = common.random_affine(torch.ones(5000, 1, 20, 60, device=device))
    theta = calls[0][0].cpu()  # with x in units of 30 pixels, and y in units of 10
    (cos, minus_sin, dx), (sin, same_cos, dy) = theta.permute(1, 2, 0)
    sin = sin * 10 / 30
    assert torch.allclose(minus_sin * 30 / 10, -sin)
    assert torch.allclose(same_cos, cos)
    assert torch.atan2(sin, cos).rad2deg().aminmax() == approx((-10, 10), abs=0.1)
    assert torch.hypot(sin, cos).reciprocal().aminmax() == approx((0.9, 1.1), abs=0.001)
    assert (dx * 30).aminmax() == approx((-2, 2), abs=0.01)
    assert (dy * 10).aminmax() == approx((-2, 2), abs=0.01)
    assert moved.amin(dim=(1, 2, 3)).median() == 0  # outside the original image


@parametrize("options", ["", "--one-cycle --augment"])
def test_a_step_neither_waits_for_the_device_nor_copies(script, device, options, train):
    def count(batch_size):
        with torch.profiler.profile() as profile:
            train(script, f"--device {device} --epochs 1 --batch-size {batch_size} {options}")
        # The calls of the scripts, not those within torch; `to` calls `_to_copy` if it has to copy.
        events = [event for event in profile.events() if event.cpu_parent is None]
        called = [part.name for event in events for part in (event, *event.cpu_children)]
        return [called.count(f"aten::{name}") for name in ("item", "is_nonzero", "_to_copy")]

    assert count(250) == count(25)  # 1 and 10 steps; the last one is printed


def test_each_epoch_has_a_new_order_that_only_the_seed_decides(small_mnist):
    def order(loader):
        return torch.cat([labels for _, labels in loader]).tolist()

    first, same, other = (load_data(f"--seed {seed}").train_loader for seed in "001")
    epochs = [order(first), order(first)]
    torch.rand(3)  # advances the global generator
    assert [order(same), order(same)] == epochs
    assert epochs[0] != epochs[1]
    assert epochs[0] != order(other)
    assert sorted(epochs[0]) == sorted(first.labels.tolist())


@parametrize(("limit", "count"), [(7, 7), (100, 10)])
def test_limit_takes_the_first_images_and_validate_the_last_ones(limit, count, small_mnist):
    images, labels = read_mnist(train=True)
    data = load_data(f"--limit {limit} --validate 240")
    for loader, part in ((data.train_loader, slice(count)), (data.eval_loader, slice(10, 250))):
        assert torch.equal(loader.images, images[part])
        assert torch.equal(loader.labels, labels[part])


NO_SAMPLES = "no training samples; use a smaller --validate, or more data"


@parametrize("count", [250, 1000])
def test_no_training_images_left_is_an_error_before_training(count, fail):
    assert fail(cnn_mnist, f"--validate {count}") == (1, f"error: {NO_SAMPLES}", "")


def test_own_data_without_training_samples_is_an_error():
    nothing = common.Loader(torch.zeros(0, 4), torch.zeros(0).long())
    with raises(UserError, match=NO_SAMPLES):
        common.Data(nothing, nothing, ["a", "b", "c"])


def test_synthetic_digits_repeat_and_do_not_leak():
    first, same = (load_data("--dataset synthetic") for _ in range(2))
    images, labels = first.train_loader.images, first.train_loader.labels
    test, same_test = (data.eval_loader.images for data in (first, same))
    assert torch.equal(test, same_test)
    assert len(torch.cat([images, test]).flatten(1).unique(dim=0)) == 70_000
    assert (images.shape, images.min(), images.max()) == ((60_000, 1, 28, 28), 0, 1)
    assert labels.bincount(minlength=10).min() > 0.08 * 60_000


def test_synthetic_digits_are_learned(capsys):
    # With a learning rate that decays to 0, the result depends little on a machine's rounding.
    rnn_mnist.main("--dataset synthetic --limit 30000 --epochs 1 --batch-size 50 --one-cycle")
    assert figures(capsys.readouterr().out, "accuracy")[0] >= 98


MNIST = HERE / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.mark.skipif(not MNIST.is_file(), reason="MNIST is not in ./data")
def test_real_mnist_is_learned(capsys):
    cnn_mnist.main(["--data-dir", HERE / "data", "--epochs", 1])
    assert figures(capsys.readouterr().out, "accuracy")[0] >= 96


# ---- where it runs ----


def test_an_import_changes_nothing():
    program = """if True:
        import ctypes, os, sys, torchvision
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


def test_main_makes_a_gpu_repeat_itself(script, train, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.mkldnn, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    train(script, "--epochs 0")
    assert torch.backends.cudnn.deterministic
    assert torch.backends.mkldnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2"


def no_data(args):
    raise UserError(f"no data for {args.epochs} epochs")


def test_a_notebook_shows_an_error_as_one_line_and_goes_on(script, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # like a notebook's, no TextIOWrapper
    monkeypatch.setattr(sys, "argv", ["/usr/lib/colab_kernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(common, "load_data", no_data)
    with raises(UserError) as raised:
        common.run(script.main)
    assert raised.value._render_traceback_() == ["error: no data for 10 epochs"]


@parametrize("options", [["--epochs", 3], "--epochs 3", " --epochs\n3"])
def test_options_are_a_list_or_a_string(script, options, monkeypatch):
    monkeypatch.setattr(common, "load_data", no_data)
    with raises(UserError, match="no data for 3 epochs"):
        script.main(options)


def test_a_mistake_in_the_program_keeps_its_traceback():
    with raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


@pytest.fixture(params=["", "1"])
def process(script, request, small_mnist):
    """A run that has printed two lines. Without line buffering, they would arrive at the end."""
    if os.name != "posix":
        pytest.skip("needs POSIX signals and pipes")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
    with start(script, "--batch-size 1 --epochs 30", PYTHONUNBUFFERED=request.param) as process:
        assert process.stdout.readline().startswith("Device")
        assert "Step [100/250]" in process.stdout.readline()
        yield process


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
    *("--epochs x", "--seed x", "--lr fast", "--dataset emnist", "--device gpu", "--device meta"),
    *("--batch-size 0", "--batch-size y", "--limit 0", "--validate 0", "--hidden 0", "--layers 0"),
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
    groups = re.findall(r"^(\w+):$", page.output, re.MULTILINE)
    assert groups[-3:] == ["training", "data", "results"]


def test_device_auto_is_the_accelerator_otherwise_the_cpu():
    args = common.parse_args(common.make_parser(""), "")
    assert args.device.type == DEVICES[-1]


def test_a_device_that_fails_is_one_line(fail, monkeypatch):
    def ones(size, device):
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")

    monkeypatch.setattr(torch, "ones", ones)
    failure = fail(cnn_mnist, "--device cuda:9")
    says = "--device: cuda:9 cannot be used: CUDA error: invalid device ordinal; try --device cpu"
    assert failure.status == 2
    assert failure.message.endswith(says)


# ---- own network and own data ----


def flat(inputs, outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(inputs, outputs))


def own_data(shape, classes):
    """60 training and 30 test samples of three classes."""
    train, test = (
        DataLoader(TensorDataset(torch.randn(count, *shape), torch.arange(count) % 3), 8)
        for count in (60, 30)
    )
    return common.Data(train, test, classes)


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
    before = weights(mine)
    run = train(script, f"--device {device} --epochs 1", mine)
    assert run.model is mine
    assert "Model: Own (27,090 parameters)" in run.output  # 10 * 2,705 + 40
    assert not torch.equal(weights(mine).cpu(), before)


def test_each_epoch_trains_in_training_mode(script, train):
    """Also if the network comes in evaluation mode, as after a look at some predictions."""
    mine, modes = Own().eval(), []
    mine.register_forward_hook(lambda *_: modes.append(mine.training))
    train(script, "--epochs 2", mine)
    assert modes == [True, True, True, False] * 2
    assert not mine.training  # ready to use


def test_a_class_is_called_after_the_seed_is_set(script, train):
    first, same, other = (train(script, f"--epochs 0 --seed {seed}", Own).model for seed in "001")
    assert same_weights(first, same)
    assert not same_weights(first, other)


def test_the_network_of_a_script_is_the_same_in_any_form(script, train):
    network = CNN if script is cnn_mnist else RNN
    torch.manual_seed(0)
    forms = [(), (network,), (network(),)]
    default, *others = (train(script, "--epochs 1", *form).model for form in forms)
    assert all(same_weights(model, default) for model in others)


def test_the_cnn_computes_with_the_channels_last_on_a_cpu():
    model, layouts = CNN(), []
    model.conv2.register_forward_hook(
        lambda layer, inputs, output: layouts.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    model(torch.rand(3, 1, 28, 28))
    assert layouts == [True]


def test_hidden_and_layers_shape_the_lstm(train):
    lstm = train(rnn_mnist, "--epochs 0 --hidden 8 --layers 3").model.lstm
    assert (lstm.hidden_size, lstm.num_layers) == (8, 3)


def test_an_lstm_reads_sequences_of_one_step():
    model, sequences = RNN(), torch.rand(5, 1, 28)
    out, _ = model.lstm(sequences)
    assert torch.equal(model(sequences), model.fc(out[:, -1]))


def test_an_lstm_refuses_colour_pictures():
    with raises((RuntimeError, ValueError)):
        RNN()(torch.rand(5, 3, 28, 28))


@parametrize("shape", [(3, 32, 32), (12, 5)])  # colour images, and sequences
def test_own_data_is_reported_with_its_own_names(script, shape, device, train):
    names = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"]
    network, data = flat(math.prod(shape)), own_data(shape, names)
    run = train(script, f"--device {device} --epochs 1 --errors e.png", network, data)
    assert "Data: custom data (60 training and 30 test samples)\n" in run.output
    assert "mnist" not in run.output
    lines = run.output.splitlines()
    for name, line in zip(names, lines[-9:-6], strict=True):
        assert re.fullmatch(rf"{name} .* 10", line)
    assert lines[-5].split() == names  # above the matrix, whole


@parametrize(("classes", "outputs", "names"), [("abc", 5, "abc34"), ("abcde", 3, "abc")])
def test_classes_without_a_name_are_numbered(classes, outputs, names, train):
    run = train(cnn_mnist, "--epochs 1", flat(4, outputs), own_data([4], list(classes)))
    matrix = run.output.splitlines()[-outputs:]
    assert [row[0] for row in matrix] == list(names)


def test_errors_of_shuffled_images_are_not_drawn(train):
    data = own_data([1, 4, 4], ["a", "b", "c"])
    data.eval_loader = DataLoader(data.eval_loader.dataset, shuffle=True)
    with raises(UserError, match="eval_loader must not shuffle"):
        train(cnn_mnist, "--epochs 1 --errors e.png", flat(16), data)
    assert not Path("e.png").exists()


# ---- evaluate and report ----


def identity(count):
    """A network whose logits are its inputs (N, count)."""
    model = nn.Sequential(nn.Linear(count, count, bias=False), nn.Dropout())
    nn.init.eye_(model[0].weight)
    return model


@parametrize("training", [True, False])
def test_evaluate_computes_each_figure(device, training):
    model = identity(2).to(device).train(training)
    logits = 3 * torch.eye(2)[[0, 1, 0, 1]]
    labels = torch.tensor([0, 0, 0, 1])
    evaluation = common.evaluate(model, DataLoader(TensorDataset(logits, labels), 3))
    loss = (3 * math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))) / 4
    assert evaluation.loss == approx(loss)
    assert evaluation.accuracy == 0.75
    assert type(evaluation.loss) is type(evaluation.accuracy) is float
    assert evaluation.confusion.tolist() == [[2, 1], [0, 1]]
    assert torch.equal(evaluation.logits, logits)
    assert torch.equal(evaluation.labels, labels)
    assert not evaluation.logits.requires_grad
    assert all(module.training == training for module in model.modules())


def test_labels_of_few_bits_do_not_overflow():
    evaluation = common.evaluate(identity(17), [(torch.eye(17), torch.arange(17).byte())])
    assert torch.equal(evaluation.confusion, torch.eye(17).long())


def test_evaluation_does_not_change_the_training(script, train, monkeypatch):
    model = train(script, "--epochs 2 --augment").model
    nothing = SimpleNamespace(loss=0, accuracy=0, confusion=torch.zeros(10, 10))
    monkeypatch.setattr(common, "evaluate", lambda *args: nothing)
    assert same_weights(model, train(script, "--epochs 2 --augment").model)


@pytest.fixture
def tables(capsys):
    """A function that returns the lines of both tables."""

    def tables(confusion, names):
        common.print_tables(confusion, names)
        return capsys.readouterr().out.splitlines()

    return tables


CONFUSION = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])  # no sample of the third class


def test_table_of_each_class(tables):
    rows = [line.split() for line in tables(CONFUSION, ["cat", "dog", "cow"])]
    assert rows[0] == ["Class", "Precision", "Recall", "F1", "Count"]
    assert rows[1] == ["cat", "0.8889", "0.8000", "0.8421", "10"]  # 8/9, 8/10, 16/19
    assert rows[2] == ["dog", "0.8182", "0.9000", "0.8571", "10"]  # 9/11, 9/10, 18/21
    assert rows[3] == ["cow", "0.0000", "0.0000", "0.0000", "0"]


def test_confusion_matrix_has_a_row_per_true_class(tables):
    matrix = tables(CONFUSION, ["cat", "dog", "cow"])[-4:]
    rows = ["cat dog cow", "cat 8 2 0", "dog 1 9 0", "cow 0 0 0"]
    assert [line.split() for line in matrix] == [row.split() for row in rows]


@parametrize("names", [list("0123456789"), datasets.FashionMNIST.classes])
def test_tables_are_aligned_and_fit_in_80_columns(names, tables):
    lines = tables(torch.full((10, 10), 999), names)
    assert len(set(map(len, lines[:11]))) == len(set(map(len, lines[12:]))) == 1
    assert max(map(len, lines)) <= 80
    assert " 1000000" in tables(torch.full((10, 10), 1000000), names)[-1]


def test_report_is_that_of_the_last_evaluation(script, train):
    Path("data/MNIST").rename("data/KMNIST")
    run = train(script, "--dataset kmnist --epochs 2 --lr 0.003")
    matrix = [line.split() for line in run.output.splitlines()[-10:]]
    assert [row[0] for row in matrix] == datasets.KMNIST.classes
    assert [list(map(int, row[1:])) for row in matrix] == run.evaluation.confusion.tolist()
    assert figures(run.output, "Test loss")[-1] == approx(run.evaluation.loss, abs=1e-4)


def test_zero_epochs_only_evaluate(script, train):
    run = train(script, "--epochs 0 --one-cycle")
    header, scores, *_ = run.output.splitlines()
    assert header.endswith("Data: mnist (130 test samples)")
    assert scores.startswith(f"Test loss: {run.evaluation.loss:.4f}, Test accuracy: ")
    assert "Training finished." not in run.output


def test_validation_is_called_so(script, train):
    output = train(script, "--epochs 1 --validate 120 --log log.csv").output
    assert "mnist (130 training and 120 validation samples)" in output
    assert "Validation loss: " in output
    assert "Validation accuracy: " in output
    assert "Test" not in output
    head = "epoch,train_loss,validation_loss,validation_accuracy,seconds"
    assert Path("log.csv").read_text().startswith(head)


class Evaluations:
    """Stands for common.evaluate: returns these figures, one per epoch, then interrupts."""

    def __init__(self, *figures):
        self.figures = list(figures)

    def __call__(self, model, loader):
        if not self.figures:
            raise KeyboardInterrupt
        loss, accuracy = self.figures.pop(0)
        return SimpleNamespace(loss=loss, accuracy=accuracy)


def test_each_epoch_reports_its_own_figures_until_an_interrupt(script, fail, file, monkeypatch):
    monkeypatch.setattr(common, "evaluate", Evaluations((0.5, 0.9), (0.7, 0.8)))
    failure = fail(script, f"--save weights.pt --log {file}")
    assert failure[:2] == (130, "Interrupted.")
    assert figures(failure.output, "Test loss") == [0.5, 0.7]
    assert figures(failure.output, "Test accuracy") == [90, 80]
    head, first, second = file.read_text().splitlines()
    assert head == "epoch,train_loss,test_loss,test_accuracy,seconds"
    assert re.fullmatch(r"1,\d\.\d{6},0\.500000,0\.900000,\d+\.\d\d", first)
    assert re.fullmatch(r"2,\d\.\d{6},0\.700000,0\.800000,\d+\.\d\d", second)
    assert Path("weights.pt").is_file()


def test_time_is_that_of_training_without_evaluation(script, train, monkeypatch):
    clock = itertools.count()  # advances by 1 s in each forward pass, and if somebody looks at it

    def tick(*args):
        next(clock)

    mine = Own()
    mine.register_forward_hook(tick)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    run = train(script, "--epochs 2", mine)
    assert figures(run.output, "Time") == [4, 4]  # three steps, and the look at the end


@parametrize(("loss", "lr"), [(0.5, 1e37), (math.inf, 0.001)])
def test_a_loss_that_is_not_finite_saves_nothing(script, loss, lr, fail, file, monkeypatch):
    """In training, or in the evaluation."""
    monkeypatch.setattr(common, "evaluate", Evaluations((loss, 0.1)))
    failure = fail(script, f"--save {file} --log log.csv --lr {lr}")
    advice = "try a smaller --lr, or look for values in the data that are not finite"
    says = f"error: the loss is not finite; {advice}"
    assert failure[:2] == (1, says)
    assert "accuracy" not in failure.output
    assert file.read_text() == "of a former run"
    assert not Path("log.csv").exists()


def draw(images, logits, labels, names=("zero", "one")):
    """The sheet of errors, uint8 (3, H, W), of images (N, C, H, W) with these logits (N, 2)."""
    evaluation = SimpleNamespace(logits=logits, labels=torch.tensor(labels))
    common.draw_errors("e.png", evaluation, [(images, evaluation.labels)], names)
    return pil_to_tensor(Image.open("e.png"))


def test_errors_most_confident_first(capsys):
    images, confidence = torch.rand(129, 1, 28, 28), torch.linspace(0.01, 1, 129)
    sheet = draw(images, torch.stack([confidence, -confidence], dim=1), [1] * 129)
    width = sheet.shape[2] // 10
    for row, column, image in ((0, 0, images[128]), (0, 1, images[127]), (9, 9, images[29])):
        drawn = sheet[:, 140 * row + 4 :: 3, width * column + 18 :: 3][:, :28, :28]
        assert ((drawn - image * 255).abs() <= 1).all()
    assert capsys.readouterr().out == "e.png shows 100 of 129 mistakes.\n"


def test_errors_are_labelled_with_the_names_that_the_font_can_draw(monkeypatch):
    texts = spy(monkeypatch, ImageDraw.ImageDraw, "multiline_text")
    long = "a class with a name of 37 letters 1990"
    logits = torch.tensor([[1.0, 0], [3, 0], [0, 2]])  # the second one is right
    sheet = draw(torch.rand(3, 1, 8, 8), logits, [1, 0, 0], ["Größe", long])
    assert [text for _, _, text, *_ in texts] == [
        f"true: 0\npred: {long}\n88.1% sure",  # e^2 / (e^2 + 1)
        f"true: {long}\npred: 0\n73.1% sure",  # e / (e + 1)
    ]
    assert sheet.shape[2] > 10 * 220  # the whole name


ZERO = torch.tensor([[1.0, 0]])  # logits of class 0


def test_no_errors_are_an_empty_sheet():
    assert draw(torch.rand(1, 1, 28, 28), ZERO, [0]).min() == 255


@parametrize(("mean", "std"), [(0, 1), (0.5, 0.25)])
def test_errors_in_colour(mean, std):
    image = torch.zeros(1, 3, 14, 28)
    image[:, 0] = 1  # red above
    image[:, 1, 7:] = 0.5  # orange below
    sheet = draw((image - mean) / std, ZERO, [1])
    assert sheet[:, [10, 32, 62], 62].T.tolist() == [[255, 0, 0], [255, 127, 0], [255, 255, 255]]


# ---- files ----


CNN_WEIGHTS = CNN().state_dict()


def test_saved_weights_are_loaded(script, device, train, file):
    options = f"--device {device} {'--hidden 16 --layers 3' if script is rnn_mnist else ''}"
    saved = train(script, f"{options} --epochs 2 --save {file}")
    loaded = train(script, f"{options} --epochs 0 --load {file}")
    assert same_weights(saved.model, loaded.model)
    assert figures(loaded.output, "accuracy") == figures(saved.output, "accuracy")[-1:]
    resumed = train(script, f"{options} --epochs 1 --load {file}")
    assert not same_weights(saved.model, resumed.model)


def test_saved_weights_are_a_plain_state_dict_on_the_cpu(device, train, file):
    trained = train(cnn_mnist, f"--device {device} --epochs 1 --save {file}").model
    weights = torch.load(file)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    plain = CNN()
    plain.load_state_dict(weights)
    assert same_weights(plain, trained.cpu())


def test_weights_that_somebody_saved_on_a_gpu_are_loaded(train, file, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save(CNN_WEIGHTS, file)
    loaded = train(cnn_mnist, f"--epochs 0 --load {file}").model
    assert torch.equal(loaded.fc.weight, CNN_WEIGHTS["fc.weight"])


class Harmful:
    """Makes the folder `trace` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_loading_runs_no_code(fail, file, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # unless it is passed
    torch.save({"weights": Harmful()}, file)
    assert fail(cnn_mnist, f"--load {file}").status == 1
    assert not Path("trace").exists()


OTHER_WEIGHTS = {
    "text": b"seven is a digit",
    "empty": b"",
    "list": [],
    "checkpoint": {"weights": CNN_WEIGHTS},
    "classes": {**CNN_WEIGHTS, "fc.bias": torch.zeros(11)},
    "hidden": RNN(16).state_dict(),
    "layers": RNN(128, 3).state_dict(),
}


@parametrize("content", OTHER_WEIGHTS)
def test_other_weights_are_refused(script, content, fail, file):
    weights = OTHER_WEIGHTS[content]
    if isinstance(weights, bytes):
        file.write_bytes(weights)
    else:
        torch.save(weights, file)
    name = "CNN" if script is cnn_mnist else "RNN"
    advice = f"use a file that --save wrote for the network {name}, with layers of the same size"
    failure = fail(script, f"--load {file}")
    assert_one_line(failure, f"error: cannot load {file} (", f"); {advice}")


def test_missing_weights_are_one_line(fail):
    assert_one_line(
        fail(cnn_mnist, "--load x.pt"), "error: cannot load x.pt ([Errno 2] No such file"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
@parametrize("option", ["--save", "--errors"])
def test_a_full_disk_keeps_the_file(option, fail, file):
    os.symlink("/dev/full", f"{file}.part")
    failure = fail(cnn_mnist, f"--epochs 1 {option} {file}")
    reason = "[Errno 28] No space left on device; choose another path"
    assert failure[:2] == (1, f"error: cannot write {file}: {reason}")
    assert file.read_text() == "of a former run"
    assert not os.path.lexists(f"{file}.part")


def test_an_interrupt_while_saving_keeps_the_file(fail, file, monkeypatch):
    monkeypatch.setattr(torch, "save", interrupt)
    assert fail(cnn_mnist, f"--save {file}")[:2] == (130, "Interrupted.")
    assert file.read_text() == "of a former run"
    assert not os.path.exists(f"{file}.part")


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
@each_file_option
def test_through_a_link_the_target_is_written(option, train, file):
    link = file.with_name("link.png")
    link.symlink_to(file)
    train(cnn_mnist, f"--epochs 1 {option} {link}")
    assert link.is_symlink()
    assert b"of a former run" not in file.read_bytes()


@each_file_option
@parametrize(
    ("place", "why"),
    [
        ("folder.png", "it is a folder"),
        ("missing/file.png", "its folder does not exist or is write-protected"),
    ],
)
def test_a_bad_place_is_an_error_before_training(option, place, why, fail):
    os.mkdir("folder.png")
    says = f"error: cannot write {place}: {why}; choose another path"
    assert fail(cnn_mnist, f"{option} {place}") == (1, says, "")


def test_an_error_in_the_clean_up_is_one_line(fail):
    file = "x" * 252  # with `.part`, the name is too long
    assert_one_line(fail(cnn_mnist, f"--epochs 1 --save {file}"), f"error: cannot write {file}: ")


@parametrize("place", ["missing", "data/MNIST/raw/train-labels-idx1-ubyte", "x" * 300])
def test_missing_data_is_one_line(place, fail, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    failure = fail(cnn_mnist, f"--data-dir {place}")
    start = f"error: cannot read or download {Path(place) / 'MNIST/raw'}: "
    assert_one_line(failure, start, "; without internet access, use --dataset synthetic")


@parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@parametrize("length", [0, 100])
def test_damaged_data_is_one_line_and_stays(name, length, fail):
    damaged = RAW / name
    damaged.write_bytes(damaged.read_bytes()[:length])
    failure = fail(rnn_mnist)
    assert_one_line(failure, f"error: cannot read or download {RAW}: ")
    assert "after an interrupted download, move that folder away" in failure.message
    assert damaged.stat().st_size == length


# ---- pictures of your own ----


def draw_page(digit):
    """A picture of one digit, dark on light, not in the middle."""
    picture = Image.new("L", (500, 400), 255)
    ImageDraw.Draw(picture).text((250, 120), str(digit), fill=0, font_size=200)
    return picture


def on_a_table(page):
    table = ImageOps.expand(Image.new("L", (400, 350), 255), (100, 0, 0, 50), fill=90)
    return ImageChops.multiply(page, table)


def on_ruled_paper(page):
    draw = ImageDraw.Draw(page)
    for y in range(0, 400, 40):
        draw.line((0, y, 500, y), fill=200, width=3)
    return page


def with_grain(page, sigma=40):
    noise = torch.randn(page.size[::-1], generator=torch.Generator().manual_seed(0))
    return to_pil_image((pil_to_tensor(page) + sigma * noise).clamp(0, 255).byte())


def on_dark_coloured_paper(page):
    return with_grain(ImageOps.colorize(page, "khaki", "darkslategray"))


def with_a_thin_pencil(page):
    return with_grain(page.filter(ImageFilter.MaxFilter(9)).point(lambda x: 100 + x // 2), 10)


def with_a_thick_felt_pen(page):
    return page.filter(ImageFilter.MinFilter(9)).crop((245, 150, 390, 320))


def on_a_grey_patch(page):
    return ImageOps.expand(page.point(lambda x: x * 200 // 255), 100, fill=255)


def on_transparency(page):
    return Image.merge("LA", (Image.new("L", page.size, 0), ImageOps.invert(page)))


PAPERS = [on_a_table, on_ruled_paper, on_dark_coloured_paper, on_a_grey_patch, on_transparency]
PENS = [with_a_thin_pencil, with_a_thick_felt_pen]


@parametrize("form", PAPERS + PENS)
@parametrize("digit", [2, 4, 5, 7])
def test_a_picture_of_any_form_is_read_like_a_plain_one(form, digit):
    form(draw_page(digit)).save("other.png")
    plain = common.mnist_form(common.grey_levels(draw_page(digit)))
    other = common.read_picture("other.png")
    assert 0.06 < other.mean() < 0.18  # near MNIST's 0.1307, for thin and for thick pens
    # Another pen changes up to 0.6 of the ink, a larger page 0.3, and another digit more than 1.
    most = 0.6 if form in PENS else 0.4
    assert (plain - other).abs().sum() < most * plain.sum()


def test_a_photo_is_rotated_as_its_camera_says():
    page = draw_page(7)
    exif = page.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    page.transpose(Image.Transpose.ROTATE_90).save("7.jpg", exif=exif)
    plain, other = common.mnist_form(common.grey_levels(page)), common.read_picture("7.jpg")
    assert (plain - other).abs().sum() < 0.1 * plain.sum()


@parametrize("digit", range(10))
def test_a_digit_is_upright_and_where_mnist_has_it(digit):
    page = draw_page(digit)
    image = common.mnist_form(common.grey_levels(page))
    bold = to_pil_image(image).point(lambda x: x if x > 64 else 0)
    small = bold.crop(bold.getbbox())
    assert 18 <= max(small.size) <= 20
    page = ImageOps.invert(page)
    page = page.crop(page.getbbox()).resize(small.size)
    pixels = torch.stack([pil_to_tensor(picture).flatten() for picture in (small, page)])
    assert torch.corrcoef(pixels.float())[0, 1] > 0.75
    for axis in (1, 2):
        mass = image.sum(dim=(0, axis)) / image.sum()
        assert mass @ torch.arange(28.0) == approx(14, abs=0.5)


def test_predict_prints_the_digit_and_its_probability(script, device, train, file):
    model = train(script, f"--epochs 10 --batch-size 25 --save {file}").model
    draw_page(7).save("7.png")
    logits = model.to(device)(common.read_picture("7.png")[None].to(device))
    probability, label = logits.softmax(dim=1)[0].max(dim=0)
    run = train(script, f"--data-dir nowhere --device {device} --load {file} --predict 7.png")
    assert run.output == f"7.png: {label} ({probability:.1%})\n"
    assert run.evaluation is None


def test_predict_switches_dropout_off(train, file):
    draw_page(7).save("7.png")
    network = flat(784, 10)
    torch.save(network.state_dict(), file)
    options = f"--load {file} --predict 7.png"
    outputs = {train(cnn_mnist, f"{options} --seed {seed}", network).output for seed in "0123"}
    assert len(outputs) == 1


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(fail):
    torch.save(CNN_WEIGHTS, "weights.pt")
    draw_page(2).save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:-500])
    Path("text.png").write_text("seven")
    with_grain(Image.new("L", (300, 200), 240), 4).save("blank.png")
    failure = fail(
        cnn_mnist, "--load weights.pt --predict gone.png cut.png text.png blank.png good.png"
    )
    assert failure.status == 1
    assert failure.output.startswith("good.png: ")
    for reason in ("gone.png: [Errno 2]", "cut.png: ", "text.png: cannot", "blank.png: no strokes"):
        assert f"cannot read a digit from {reason}" in failure.message
