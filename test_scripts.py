"""Tests of the scripts, on the CPU and on the machine's accelerator where it has one: python -m pytest

They need no network. Those that need the real MNIST use ./data, and are skipped where it is not there.
"""

import builtins
import errno
import io
import math
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import cnn_mnist
import common
import rnn_mnist

HERE = Path(__file__).parent
SCRIPTS = [cnn_mnist, rnn_mnist]
MODELS = [cnn_mnist.CNN, rnn_mnist.RNN]
DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
each_model = pytest.mark.parametrize("model_class", MODELS)
each_device = pytest.mark.parametrize("device", DEVICES)
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and modes of files as POSIX has them")
real_mnist = pytest.mark.skipif(
    not (HERE / "data/MNIST/raw/train-images-idx3-ubyte").is_file(), reason="MNIST is not in ./data"
)


def write_idx(path, values):
    """Write a uint8 tensor as an IDX file: 0, 0, type 8, dimensions, each size in 4 bytes big-endian, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.dim()]) + sizes + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def data_dir(tmp_path):
    """A folder with a small MNIST of drawn digits: 250 training and 130 test images."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for split, count in (("train", 250), ("t10k", 130)):
        images, labels = common.draw_digits(count, generator)
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
    return tmp_path


@pytest.fixture
def train(data_dir, capsys):
    """A function that trains in this process on the small MNIST, and returns the model and what was printed."""

    def train(script, *options):
        model = script.main(["--data-dir", str(data_dir), "--device", "cpu", *map(str, options)])
        return model, capsys.readouterr().out

    return train


@pytest.fixture
def fail(monkeypatch, capsys):
    """A function that runs a script's command line in this process, and returns exit status, message and output."""

    def fail(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            common.run(script.main)
        output, message = capsys.readouterr()
        assert exit.value.code == 2 or message.count("\n") == 1
        return exit.value.code, message, output

    return fail


def start(script, *options, python=(), stdout=subprocess.PIPE, **variables):
    """Start a script as a process of its own, its output buffered as Python does by default."""
    command = [sys.executable, *python, HERE / f"{script.__name__}.py", *map(str, options)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables
    heed_ctrl_c = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=env, preexec_fn=heed_ctrl_c, **pipes)


def load_data(*options):
    """The data that the options ask for, on the CPU where they do not say otherwise."""
    return common.load_data(common.make_parser("").parse_args(["--device", "cpu", *map(str, options)]))


def mnist(data_dir, train=False):
    """The images (N, 1, 28, 28) and labels (N,) of a split, as torchvision gives them one by one."""
    images, labels = zip(*datasets.MNIST(data_dir, train=train, transform=transforms.ToTensor()), strict=True)
    return torch.stack(images), torch.tensor(labels)


def losses(output):
    return [float(loss) for loss in re.findall(r"Step .*, Loss: (\S+)", output)]


def accuracies(output):
    return [float(percent) for percent in re.findall(r"Test accuracy: (\S+)%", output)]


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def record(monkeypatch, owner, name, what):
    """Let each call of owner.name add to the list that is returned what(*arguments) says of it, and go on as before."""
    seen, original = [], getattr(owner, name)

    def recorder(*args, **kwargs):
        seen.append(what(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorder)
    return seen


# ---- training ----


@each_script
@each_device
def test_smoke_one_batch(script, device, train):
    before, _ = train(script, "--device", device, "--epochs", 0)
    after, output = train(script, "--device", device, "--epochs", 1, "--limit", 100)
    assert len(losses(output)) == 1
    assert math.isfinite(losses(output)[0])
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert new.grad.any()
        assert not torch.equal(old, new)


@each_script
@each_device
@pytest.mark.parametrize("option", [[], ["--one-cycle"], ["--augment"], ["--amp"]], ids=str)
def test_same_seed_same_weights(script, device, option, train):
    options = ["--device", device, "--epochs", 2, "--limit", 100, "--batch-size", 32, *option]
    model, _ = train(script, *options)
    assert same_weights(model, train(script, *options)[0])
    assert not same_weights(model, train(script, *options, "--seed", 1)[0])
    if option:
        assert not same_weights(model, train(script, *options[: -len(option)])[0])
    else:
        start, _ = train(script, "--epochs", 0)
        assert not any(
            torch.equal(a, b)
            for a, b in zip(start.parameters(), train(script, "--epochs", 0, "--seed", 1)[0].parameters(), strict=True)
        )


@each_script
def test_evaluation_does_not_change_the_weights(script, train, monkeypatch):
    with_evaluation, _ = train(script, "--epochs", 2, "--augment")
    nothing = common.Evaluation(0.0, 0.0, torch.eye(10, dtype=torch.int64), None)
    monkeypatch.setattr(common, "evaluate", lambda *_: nothing)
    without, _ = train(script, "--epochs", 2, "--augment")
    assert same_weights(with_evaluation, without)


@each_script
@each_device
@pytest.mark.parametrize("options", [[], ["--one-cycle", "--augment"]], ids=str)
def test_a_step_neither_waits_for_the_device_nor_converts(script, device, options, train):
    def count(batch_size):
        with torch.profiler.profile() as profile:
            train(script, "--device", device, "--epochs", 1, "--batch-size", batch_size, *options)
        called = [event.name for event in profile.events() if event.cpu_parent is None]  # by the scripts, not in torch
        return [called.count(name) for name in ("aten::item", "aten::is_nonzero", "aten::to")]

    assert count(250) == count(25)  # 1 and 10 steps, of which the last is printed


@each_script
def test_defaults_train_as_the_tutorial_does(script, data_dir, train):
    trained, output = train(script, "--epochs", 2, "--log", data_dir / "log.csv")
    model, _ = train(script, "--epochs", 0)
    loader = load_data("--data-dir", data_dir).train_loader
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    rows = (data_dir / "log.csv").read_text().splitlines()[1:]
    for printed, row in zip(losses(output), rows, strict=True):
        total = 0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)  # the last batch is smaller
        assert printed == pytest.approx(loss.item(), abs=2e-4)
        assert float(row.split(",")[1]) == pytest.approx(total / 250, abs=1e-4)
    for expected, weights in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(weights, expected, atol=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_is_kept_for_the_next_step_however_training_is_started(data_dir):
    program = (
        "import resource, sys, rnn_mnist\n"
        "def faults(epochs):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    rnn_mnist.main([*sys.argv[1:], '--epochs', epochs])\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults('1'); print(faults('11') - faults('1'))"
    )
    command = [sys.executable, "-c", program, "--data-dir", data_dir, "--device", "cpu"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout
    assert int(output.split()[-1]) < 30 * 500  # 30 steps more; 9,000 each where memory is given back


def test_pooling_before_relu_gives_the_same_logits():
    model, images = cnn_mnist.CNN(), torch.rand(4, 1, 28, 28)
    x = nn.functional.max_pool2d(model.conv1(images).relu(), 2)
    x = nn.functional.max_pool2d(model.conv2(x).relu(), 2)
    assert torch.equal(model(images), model.fc(x.flatten(1)))


@each_script
def test_what_the_readme_calls_fast(script, train, monkeypatch):
    fused = record(monkeypatch, torch.optim.Adam, "step", lambda self, *_: self.param_groups[0]["fused"])
    one_dnn = record(monkeypatch, nn.CrossEntropyLoss, "forward", lambda *_: torch.backends.mkldnn.enabled)
    model, _ = train(script, "--epochs", 1)
    assert fused == one_dnn == [True] * 3
    if script is cnn_mnist:
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    train(script, "--epochs", 1, "--amp", "--limit", 100)
    assert torch.backends.mkldnn.enabled


@each_script
@pytest.mark.parametrize("options", [["--batch-size", 64], ["--batch-size", 30, "--limit", 100]], ids=str)
def test_one_cycle(script, options, train, monkeypatch):
    def rate_and_momentum(optimizer, *_):
        return optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]

    def between(first, last, share):  # half a cosine
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    seen = record(monkeypatch, torch.optim.Adam, "step", rate_and_momentum)
    train(script, "--one-cycle", "--epochs", 5, *options)  # 5 epochs of 4 steps, of which the last is smaller
    up, down = [step / 5 for step in range(5)], [step / 14 for step in range(15)]  # the peak after 30% of the steps
    rates = [between(0.0004, 0.01, share) for share in up] + [between(0.01, 4e-8, share) for share in down]
    momenta = [between(0.95, 0.85, share) for share in up] + [between(0.85, 0.95, share) for share in down]
    assert [rate for rate, _ in seen] == pytest.approx(rates)
    assert [momentum for _, momentum in seen] == pytest.approx(momenta)
    seen.clear()
    train(script, "--one-cycle", "--epochs", 5, "--lr", 0.002, *options)
    assert max(seen)[0] == pytest.approx(0.002)
    train(script, "--one-cycle", "--epochs", 1, "--limit", 1)
    train(script, "--one-cycle", "--epochs", 0)
    seen.clear()
    train(script, "--epochs", 1)
    assert seen == [(0.001, 0.9)] * 3


@pytest.mark.parametrize(("script", "pixels"), [(cnn_mnist, 1), (rnn_mnist, 2)], ids=["cnn_mnist", "rnn_mnist"])
def test_augment_by_as_much_as_the_readme_says(script, pixels, train, monkeypatch):
    maps = record(monkeypatch, nn.functional, "affine_grid", lambda theta, *_, **__: theta)
    train(script, "--augment", "--epochs", 2)
    theta = torch.cat(maps)
    assert len(theta) == 2 * 250  # each training image in each epoch, and no test image
    turn, shift = theta.split([2, 1], dim=2)  # (500, 2, 2), a rotation divided by the size, and (500, 2, 1)
    assert 9 < torch.atan2(turn[:, 1, 0], turn[:, 0, 0]).rad2deg().abs().max() < 10.01
    size = turn.det().rsqrt()
    assert 0.899 < size.min() < 0.91
    assert 1.09 < size.max() < 1.101
    assert 0.9 * pixels < shift.abs().max() * 14 < pixels + 0.01  # an image is 2 units wide


@each_script
@each_device
def test_amp(script, device, train, monkeypatch):
    dtypes = record(monkeypatch, nn.CrossEntropyLoss, "forward", lambda self, logits, _: logits.dtype)
    model, output = train(script, "--device", device, "--epochs", 1, "--amp")
    assert dtypes == [torch.bfloat16] * 3
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model(torch.rand(3, 1, 28, 28, device=device)).isfinite().all()
    assert math.isfinite(losses(output)[-1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is x86's")
def test_amp_on_a_cpu_without_bfloat16(data_dir):
    # torch and its oneDNN then use no newer instructions
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    process = start(rnn_mnist, "--data-dir", data_dir, "--device", "cpu", "--epochs", 1, "--amp", **older)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert math.isfinite(losses(output)[-1])


def test_network_sizes(train):
    assert sum(p.numel() for p in cnn_mnist.CNN().parameters()) == 20_490
    assert sum(p.numel() for p in rnn_mnist.RNN().parameters()) == 214_282
    model, output = train(rnn_mnist, "--epochs", 0, "--hidden", 16, "--layers", 3)
    assert (model.lstm.hidden_size, model.lstm.num_layers) == (16, 3)
    assert "RNN (7,466 parameters)" in output  # 4*16 * (28+16 + 2) + 2 * 4*16 * (16+16 + 2) + 170


def test_synthetic_digits_are_learned(capsys):
    # With a rate that falls to 0, the last steps depend little on how a machine rounds.
    rnn_mnist.main(["--dataset", "synthetic", "--limit", "30000", "--epochs", "1", "--batch-size", "50", "--one-cycle"])
    assert accuracies(capsys.readouterr().out)[0] >= 98


@real_mnist
def test_real_mnist_is_learned(capsys, tmp_path):
    model = cnn_mnist.main(["--data-dir", str(HERE / "data"), "--epochs", "1"])
    assert accuracies(capsys.readouterr().out)[0] >= 96
    # Pictures of test images, large, dark on light, anywhere on a page, are recognized as well as the images.
    test = datasets.MNIST(HERE / "data", train=False)
    images, labels, generator = test.data[::50], test.targets[::50], torch.Generator().manual_seed(0)
    pictures = []
    for i, image in enumerate(images):
        size, left, top = torch.randint(200, 400, (3,), generator=generator).tolist()
        page = Image.new("L", (800, 800), "white")
        page.paste(to_pil_image(255 - image).resize((size, size), Image.Resampling.BICUBIC), (left, top))
        page.save(tmp_path / ("page.png", "page.jpg")[i % 2])
        pictures.append(common.read_picture(tmp_path / ("page.png", "page.jpg")[i % 2]))
    right = [
        (common.predict(model, [(batch, labels)])[0].argmax(dim=1).cpu() == labels).sum()
        for batch in (torch.stack(pictures), images.unsqueeze(1) / 255)
    ]
    assert right[0] >= right[1] - 4  # of 200


# ---- the tutorial's bugs ----


@each_script
def test_bug_softmax_before_cross_entropy_loss(script, train):
    # With softmax twice the loss of ten classes stays above ln(e + 9) - 1 = 1.46, also on a batch learned by heart.
    _, output = train(script, "--limit", 10, "--epochs", 120, "--lr", 0.003)
    assert losses(output)[-1] < 0.5


def test_bug_classifier_input_size():
    model = cnn_mnist.CNN()
    assert model.fc.in_features == 32 * 7 * 7
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)


@each_model
@each_device
def test_bug_batch_taken_for_time(model_class, device):
    model, images = model_class().to(device), torch.rand(5, 1, 28, 28, device=device)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-3)  # a GPU may round to TF32


def test_bug_last_batch_row_taken_for_last_time_step():
    model, images = rnn_mnist.RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(
        images[:, 0]
    )  # (2, 3, 128): what each layer has after the last of the rows, read downwards
    assert torch.allclose(model(images), model.fc(hidden[-1]), atol=1e-6)


@each_script
def test_bug_undefined_names(script, data_dir):
    process = start(script, "--data-dir", data_dir, "--epochs", 2)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    header, *lines = output.splitlines()
    assert re.fullmatch(r"Device: \S+, Model: [CR]NN \([\d,]+ parameters\), Data: mnist \(250 .* 130 test .*\)", header)
    for epoch in ("1", "2"):
        assert re.fullmatch(rf"Epoch \[{epoch}/2\], Step \[3/3\], Loss: \d\.\d{{4}}", lines.pop(0))
        result = rf"Epoch \[{epoch}/2\], Test loss: \d\.\d{{4}}, Test accuracy: \d+\.\d\d%, Time: \d+\.\d\d s"
        assert re.fullmatch(result, lines.pop(0))
    assert lines.pop(0) == "Training finished."


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(100, ["3/3"]), (2, ["100/125", "125/125"]), (1000, ["1/1"]), (125, ["2/2"])]
)
def test_bug_steps_counted_without_the_last_batch(batch_size, steps, train):
    _, output = train(cnn_mnist, "--epochs", 1, "--batch-size", batch_size)
    assert re.findall(r"Step \[(.*)\]", output) == steps


# ---- the process ----


@pytest.mark.parametrize(
    "stream", [io.StringIO(), SimpleNamespace(write=len, flush=int), None], ids=["IDLE", "notebook", "none"]
)
def test_any_stdout(stream, monkeypatch, data_dir, capfd):
    options = ["--data-dir", str(data_dir), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["cnn_mnist.py", *options])
    monkeypatch.setattr(sys, "stdout", stream)
    assert isinstance(common.run(cnn_mnist.main), cnn_mnist.CNN)
    assert stream is None or not isinstance(stream, io.StringIO) or "Training finished." in stream.getvalue()
    monkeypatch.setattr(sys, "argv", ["cnn_mnist.py", "--load", str(data_dir / "missing")])
    with pytest.raises(SystemExit):
        common.run(cnn_mnist.main)
    assert capfd.readouterr().err.startswith("error: cannot read ")


def test_a_name_that_stdout_cannot_encode(data_dir):
    options = ["--data-dir", data_dir, "--epochs", 1, "--errors", data_dir / "ängste.png"]
    output, errors = start(cnn_mnist, *options, PYTHONIOENCODING="ascii").communicate()
    assert errors == ""
    assert "\\xe4ngste.png shows" in output


@each_script
@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_in_a_kernel_main_takes_the_defaults(script, launcher, monkeypatch):
    class Stop(Exception):
        pass

    monkeypatch.setattr(sys, "argv", [f"/usr/lib/{launcher}", "-f", "/tmp/kernel.json"])
    monkeypatch.setattr(common, "load_data", Mock(side_effect=Stop))
    with pytest.raises(Stop):
        script.main()
    args = common.load_data.call_args.args[0]
    assert (args.epochs, args.dataset, args.save) == (10, "mnist", None)


@posix
@each_script
def test_model_is_there_to_go_on_with(script, data_dir):
    """In `python -i`: after training, after an interrupt, and none after an error, which is a line there too."""
    options = ["--data-dir", data_dir, "--epochs", 30, "--batch-size", 5]
    for ending in ("done", "interrupt", "error"):
        extra = {"done": ["--limit", 5], "interrupt": [], "error": ["--data-dir", data_dir / "x"]}[ending]
        with start(script, *options, *extra, python=["-i"]) as process:
            if ending == "interrupt":
                process.stdout.readline()
                process.send_signal(signal.SIGINT)
            output, errors = process.communicate("print('then', type(model).__name__)\n")
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert (
            f"then {'NoneType' if ending == 'error' else script.main.__globals__.get('CNN', nn.LSTM).__name__[:1]}"
            in output
            or "then RNN" in output
        )
        assert {"done": "", "interrupt": "Interrupted.", "error": "error: "}[ending] in errors


def test_a_notebook_shows_an_error_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(sys, "argv", ["cnn_mnist.py", "--load", str(tmp_path / "missing")])
    with pytest.raises(common.UserError) as error:
        common.run(cnn_mnist.main)
    assert error.value._render_traceback_() == [f"error: {error.value}"]


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FileNotFoundError(2, "No such file", "my.csv"),
    Image.UnidentifiedImageError("cannot identify image file 'allocate.png'"), TypeError("alloc"),
], ids=repr)  # fmt: skip
def test_an_error_in_the_reader_s_own_code_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        common.run(Mock(side_effect=error, __code__=None))
    assert raised.value is error


SHORT_OF_MEMORY = [
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), RuntimeError("std::bad_alloc"),
    RuntimeError("Storage size calculation overflowed"), torch.OutOfMemoryError("CUDA out of memory. Tried to ..."),
]  # fmt: skip


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=repr)
def test_too_little_memory_is_not_called_anything_else(error, monkeypatch, data_dir, train, fail):
    file, picture = data_dir / "weights.pt", data_dir / "7.png"
    train(cnn_mnist, "--epochs", 1, "--save", file)
    draw_page(7).save(picture)
    for owner, name in (
        (datasets.mnist, "read_image_file"),
        (torch, "load"),
        (Image, "open"),
        (cnn_mnist.CNN, "forward"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Mock(side_effect=error))
            options = ["--predict", picture] if owner is Image else ["--data-dir", data_dir]
            status, message, _ = fail(cnn_mnist, "--load", file, *options)
        assert status == 1
        assert message.startswith("error: out of memory; use a smaller --batch-size")


def test_a_network_that_no_machine_can_hold(data_dir, fail):
    status, message, _ = fail(rnn_mnist, "--data-dir", data_dir, "--device", "cpu", "--hidden", 2**61)
    assert status == 1
    assert "out of memory" in message


def test_time_is_that_of_training_alone(train, monkeypatch):
    now = [0]

    def passes(seconds):
        return lambda *_, **__: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    record(monkeypatch, torch.optim.Adam, "step", passes(1))
    record(monkeypatch, common, "evaluate", passes(100))
    for script in SCRIPTS:
        _, output = train(script, "--epochs", 2)
        assert re.findall(r"Time: (\S+) s", output) == ["3.00"] * 2


def test_the_clock_is_read_when_the_device_is_done(monkeypatch):
    calls = Mock()
    monkeypatch.setattr(torch.accelerator, "synchronize", calls.synchronize)
    monkeypatch.setattr(common, "time", calls)
    common.clock(torch.device("meta"))
    assert [name for name, *_ in calls.method_calls] == ["synchronize", "perf_counter"]


@posix
@each_script
def test_interrupt_in_the_middle_of_an_epoch(script, data_dir):
    # All that it would print is less than Python's buffer holds: the lines come at once, or not before its end.
    with start(script, "--data-dir", data_dir, "--batch-size", 1, "--epochs", 30) as process:
        assert process.stdout.readline().startswith("Device")
        assert "Step [100/250]" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert (process.returncode, errors) == (130, "Interrupted.\n")
    assert "finished" not in output


@each_script
def test_interrupt_says_what_is_saved(script, data_dir, fail, monkeypatch):
    evaluations, evaluate = [], common.evaluate

    def interrupt_the_third(model, loader):
        evaluations.append(model)
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return evaluate(model, loader)

    monkeypatch.setattr(common, "evaluate", interrupt_the_third)
    file = data_dir / "weights.pt"
    status, message, _ = fail(script, "--data-dir", data_dir, "--save", file, "--log", data_dir / "log.csv")
    assert status == 130
    assert message == f"Interrupted. {file} holds the weights after epoch 2.\n"
    assert file.is_file()
    assert len((data_dir / "log.csv").read_text().splitlines()) == 3  # the head, and what was complete


@posix
def test_closed_pipe(data_dir):
    with start(cnn_mnist, "--data-dir", data_dir, "--epochs", 1000) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_full_disk_behind_the_output(data_dir):
    with open("/dev/full", "w") as full, start(cnn_mnist, "--data-dir", data_dir, stdout=full) as process:
        assert re.fullmatch("error: .*No space left on device\n", process.stderr.read())
    assert process.returncode == 1


# ---- options ----

WHOLE = ["-1", "1.5", "nan", "inf", "-inf", "x", "", str(2**63)]
BAD = {
    **dict.fromkeys(["--epochs", "--seed"], WHOLE),
    **dict.fromkeys(["--batch-size", "--limit", "--validate", "--hidden", "--layers"], ["0", *WHOLE]),
    **dict.fromkeys(["--save", "--load", "--log", "--errors", "--data-dir", "--predict"], [""]),
    "--lr": ["0", "-1", "nan", "inf", "-inf", "x", "", "1e38"],
    "--device": ["nonsense", "cuda:99", "meta"],
    "--dataset": ["emnist"],
}


@pytest.mark.parametrize("option", BAD)
def test_bad_value(option, fail):
    for value in BAD[option]:
        status, message, _ = fail(rnn_mnist, option, value)
        assert status == 2
        assert f"error: argument {option}" in message
        assert (
            option not in ("--device", "--dataset") or {"--device": "cpu", "--dataset": "synthetic"}[option] in message
        )


@pytest.mark.parametrize(("options", "words"), [
    ("--nonsense", "--nonsense"),
    ("--predict 7.png", "see --load"),
    *((f"--load a --predict 7.png --{name} b", "could keep") for name in ("save", "errors", "log")),
    *((f"--epochs 0 --{name} a", "could keep") for name in ("save", "log")),
    *((f"--{one} a --{other} ./x/../a", "a file each") for one, other in
      [("save", "log"), ("save", "errors"), ("log", "errors"), ("load", "log"), ("load", "errors")]),
])  # fmt: skip
@each_script
def test_options_that_do_not_go_together(script, options, words, fail):
    status, message, _ = fail(script, *options.split())
    assert status == 2
    assert words in message


def test_a_link_to_the_same_file(tmp_path, fail):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert fail(cnn_mnist, "--save", tmp_path / "file", "--log", tmp_path / "link")[0] == 2


@pytest.mark.parametrize(("built", "error", "words"), [
    (False, None, "this PyTorch has no CUDA; install one"),
    (True, "The NVIDIA driver on your system is too old (found version 11040).", "driver on your system is too old"),
    (True, "Found no NVIDIA driver on your system.", "Found no NVIDIA driver"),
])  # fmt: skip
def test_why_cuda_cannot_be_used(built, error, words, fail, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=RuntimeError(error)))
    status, message, _ = fail(cnn_mnist, "--device", "cuda")
    assert status == 2
    assert words in message
    assert message.endswith("choose from auto, cpu\n")


def test_a_gpu_that_is_too_old(fail, monkeypatch, capsys):
    accelerator = Mock(**{"is_available.return_value": True, "device_count.return_value": 1})
    accelerator.current_accelerator.return_value = torch.device("xpu")
    monkeypatch.setattr(torch, "accelerator", accelerator)
    error = RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might"
    )
    ones, monkeypatch_ones = torch.ones, lambda *args, device: raise_(error) if device != "cpu" else ones(*args)
    monkeypatch.setattr(torch, "ones", monkeypatch_ones)
    assert common.find_device("auto") == torch.device("cpu")
    assert "no kernel image is available for execution on the device; taking the CPU\n" in capsys.readouterr().err
    status, message, _ = fail(cnn_mnist, "--device", "xpu")
    assert status == 2
    assert message.endswith("on the device; choose from auto, xpu, xpu:0, cpu\n")


def raise_(error):
    raise error


@pytest.mark.parametrize("device", DEVICES[1:])
def test_device_auto(device):
    assert common.find_device("auto").type == device


# ---- data ----


def order(loader):
    """The images of one pass, (N, 28*28)."""
    return torch.cat([images.cpu().flatten(1) for images, _ in loader])


@each_device
def test_loaders_give_what_to_tensor_gives(device, data_dir):
    data = load_data("--data-dir", data_dir, "--device", device)
    assert next(iter(data.train_loader))[0].device.type == device
    images, labels = next(iter(data.eval_loader))
    assert torch.equal(images.cpu(), mnist(data_dir)[0])
    assert torch.equal(labels.cpu(), mnist(data_dir)[1])


def test_shuffling_depends_on_the_seed_alone(data_dir):
    def loader(seed):
        return load_data("--data-dir", data_dir, "--seed", seed).train_loader

    first, second = loader(0), loader(0)
    passes = [order(first), order(first)]
    torch.rand(3)  # somebody else draws
    assert torch.equal(order(second), passes[0])
    torch.rand(3)
    assert torch.equal(order(second), passes[1])
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(order(loader(1)), passes[0])
    assert [len(images) for images, _ in first] == [100, 100, 50]
    assert torch.equal(passes[0].sort(dim=0).values, passes[1].sort(dim=0).values)  # each image once


def test_limit_takes_the_first_images_and_validate_the_last(data_dir):
    def same_images(loader, images):
        return torch.equal(order(loader).sort(dim=0).values, images.flatten(1).sort(dim=0).values)

    images, _ = mnist(data_dir, train=True)
    data = load_data("--data-dir", data_dir, "--limit", 7)
    assert same_images(data.train_loader, images[:7])
    assert same_images(data.eval_loader, mnist(data_dir)[0])
    data = load_data("--data-dir", data_dir, "--validate", 100)
    assert same_images(data.train_loader, images[:150])
    assert torch.equal(order(data.eval_loader), images[150:].flatten(1))
    data = load_data("--data-dir", data_dir, "--validate", 249, "--limit", 7)
    assert same_images(data.train_loader, images[:1])


def test_validate_leaves_something_to_train_on(data_dir, fail):
    for count in (250, 10**6):
        status, message, _ = fail(cnn_mnist, "--data-dir", data_dir, "--validate", count)
        assert status == 1
        assert f"--validate {count} leaves none of 250 training images" in message


def test_synthetic_digits_repeat_by_seed_and_do_not_leak():
    def draw(seed):
        data = load_data("--dataset", "synthetic", "--seed", seed)
        return data.train_loader.dataset.tensors, data.eval_loader.dataset.tensors

    (train_images, train_labels), (test_images, test_labels) = draw(0)
    assert (train_images.shape, test_images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert (train_images.min(), train_images.max()) == (0, 1)
    assert train_labels.bincount(minlength=10).min() > 5_500
    assert test_labels.bincount(minlength=10).min() > 800
    seen = {image.numpy().tobytes() for image in train_images}
    assert not any(image.numpy().tobytes() in seen for image in test_images)
    assert torch.equal(draw(0)[1][0], test_images)
    assert not torch.equal(draw(1)[1][0], test_images)


def test_random_affine_moves_as_far_as_asked():
    torch.manual_seed(0)
    images = torch.zeros(100, 1, 28, 28)
    images[:, :, 12:16, 12:16] = 1  # its centre of mass is the middle of the picture
    assert torch.allclose(common.random_affine(images, 0, 0, 0), images, atol=1e-5)
    moved = common.random_affine(images, 0, 0, 4).squeeze(1)  # (100, 28, 28)
    # Pixels off the middle, (2, 100), each axis in its own way.
    distances = torch.stack([(moved.sum(dim=axis) * (torch.arange(28) - 13.5)).sum(dim=1) / 16 for axis in (1, 2)])
    assert ((distances.amin(dim=1) > -4.01) & (distances.amin(dim=1) < -3)).all()
    assert ((distances.amax(dim=1) > 3) & (distances.amax(dim=1) < 4.01)).all()
    assert distances.corrcoef()[0, 1].abs() < 0.5
    areas = common.random_affine(images, 0, 0.5, 0).sum(dim=(1, 2, 3)) / 16
    assert 0.2 < areas.min() < 0.4
    assert 1.9 < areas.max() < 2.3
    images = torch.zeros(100, 1, 28, 28)
    images[:, :, 13:15, 24:26] = 1  # 11 pixels to the right of the middle
    turned = common.random_affine(images, 30, 0, 0).squeeze(1)
    height = (turned.sum(dim=2) * (torch.arange(28) - 13.5)).sum(dim=1) / 4
    assert -5.6 < height.min() < -4.5  # 11 * sin(30 degrees) = 5.5
    assert 4.5 < height.max() < 5.6
    full = common.random_affine(torch.ones(100, 1, 28, 28), 0, 0, 4)
    assert torch.stack([full[..., 0, :], full[..., -1, :], full[..., 0], full[..., -1]]).amin(dim=(1, 2, 3)).max() == 0


def test_random_affine_turns_without_shearing_where_the_image_is_not_square():
    torch.manual_seed(0)
    images = torch.zeros(50, 1, 20, 60)
    images[:, :, 8:12, 15:45] = 1  # a bar of 30x4 pixels in the middle
    turned = common.random_affine(images, 30, 0, 0)
    assert (turned.sum(dim=(1, 2, 3)) - 120).abs().max() < 2  # a turn keeps the area
    y, x = torch.meshgrid(torch.arange(20) - 9.5, torch.arange(60) - 29.5, indexing="ij")
    squares = (turned * (x**2 + y**2)).sum(dim=(1, 2, 3))  # and each point's distance from the middle
    assert (squares / squares.mean() - 1).abs().max() < 0.02
    assert (turned * x * y).sum(dim=(1, 2, 3)).abs().max() > 3000


@each_device
def test_random_affine_keeps_shape_range_and_device(device):
    images = torch.rand(1, 1, 28, 28, device=device).expand(50, -1, -1, -1)
    bent = common.random_affine(images)
    assert (bent.shape, bent.device, bent.dtype) == (images.shape, images.device, images.dtype)
    assert bent.min() >= 0
    assert bent.max() <= 1
    assert len(bent.flatten(1).unique(dim=0)) == 50


def test_no_mnist_and_no_network(tmp_path, fail, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    (tmp_path / "file").touch()
    for place, words in ((tmp_path, "refused"), (tmp_path / "file", "file"), ("~nosuchuser", "~nosuchuser")):
        monkeypatch.chdir(tmp_path)
        status, message, _ = fail(cnn_mnist, "--data-dir", place)
        assert status == 1
        assert all(word in message for word in (words, "--data-dir", "--dataset synthetic"))


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind", ["images-idx3-ubyte", "labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["truncated", "counts", "values"])
def test_damaged_data(split, kind, damage, data_dir, fail):
    file = data_dir / f"MNIST/raw/{split}-{kind}"
    images, labels = torch.zeros(250, 28, 28), torch.zeros(250)
    if damage == "counts":
        write_idx(file, (images if kind.startswith("images") else labels)[:99])
    elif damage == "values":
        write_idx(file, images[:, :20] if kind.startswith("images") else labels + 10)
    else:
        file.write_bytes(file.read_bytes()[:-1])
    status, message, _ = fail(rnn_mnist, "--data-dir", data_dir)
    assert status == 1
    assert f"{data_dir / 'MNIST'} is damaged" in message
    assert "delete that folder" in message
    assert len(list(file.parent.iterdir())) == 4  # nothing was deleted


def test_data_that_may_not_be_read_is_not_called_damaged(data_dir, fail, monkeypatch):
    monkeypatch.setattr(datasets.mnist, "read_image_file", Mock(side_effect=PermissionError(13, "Permission denied")))
    status, message, _ = fail(rnn_mnist, "--data-dir", data_dir)
    assert status == 1
    assert "Permission denied" in message
    assert "delete" not in message


def test_error_as_a_process(data_dir):
    (data_dir / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"")
    process = start(cnn_mnist, "--data-dir", data_dir)
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert re.fullmatch("error: .*\n", errors)


# ---- loaders and evaluation ----


class Constant(nn.Module):
    """Answers each image with the logits that it was made with, whatever the image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


@each_device
def test_evaluate_by_hand_with_an_uneven_last_batch(device):
    model = Constant(math.log(3.0), 0.0, 0.0).to(device)  # says class 0 with 3/5, the others with 1/5
    labels = torch.tensor([0, 0, 1, 2, 2])
    loader = DataLoader(TensorDataset(torch.zeros(5, 1, 28, 28), labels), batch_size=2)
    loss, accuracy, confusion, _ = common.evaluate(model, loader)
    assert loss == pytest.approx((2 * math.log(5 / 3) + 3 * math.log(5)) / 5)
    assert accuracy == pytest.approx(2 / 5)
    assert confusion.tolist() == [[2, 0, 0], [1, 0, 0], [2, 0, 0]]


def test_evaluate_leaves_mode_and_random_state():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(), nn.Linear(784, 10))
    model[1].eval()  # frozen, as in fine-tuning
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8)), batch_size=4, shuffle=True)
    state, mean = torch.get_rng_state(), model[1].running_mean.clone()
    modes = []
    model[2].register_forward_hook(lambda dropout, *_: modes.append((dropout.training, torch.is_grad_enabled())))
    common.evaluate(model, loader)
    assert modes == [(False, False)] * 2  # a pair per batch
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, mean)
    for batches in ([], [(torch.rand(1, 5), torch.zeros(1))]):
        with pytest.raises((ValueError, RuntimeError)):
            common.evaluate(model, batches)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_per_class_by_hand(capsys):
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [1, 0, 0]])  # class 2 is never predicted
    precision, recall, f1, count = common.per_class(confusion)
    assert precision.tolist() == pytest.approx([3 / 6, 4 / 5, 0])
    assert recall.tolist() == pytest.approx([3 / 4, 4 / 6, 0])
    assert f1.tolist() == pytest.approx([6 / 10, 8 / 11, 0])
    assert count.tolist() == [4, 6, 1]
    common.print_report(confusion, ["zero", "a name of 26 letters, 1990", "two"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-4:] == ["0.8000", "0.6667", "0.7273", "6"]
    assert len({len(line) for line in lines[:4]}) == len({len(line) for line in lines[5:]}) == 1  # aligned
    assert [line.split()[-3:] for line in lines[6:]] == [["3", "1", "0"], ["2", "4", "0"], ["1", "0", "0"]]


# ---- report ----


@each_script
@pytest.mark.parametrize("options", ["--epochs 2", "--epochs 2 --augment", "--epochs 0", "--epochs 1 --validate 120"])
def test_bug_test_set_never_evaluated(script, options, train, data_dir, monkeypatch):
    texts = record(monkeypatch, ImageDraw.ImageDraw, "multiline_text", lambda self, at, text, **_: text)
    file, split = data_dir / "errors.png", "Validation" if "validate" in options else "Test"
    model, output = train(script, *options.split(), "--batch-size", 10, "--lr", 0.003, "--errors", file)
    images, labels = (part[-120:] for part in mnist(data_dir, train=True)) if "validate" in options else mnist(data_dir)
    # All of it anew, one image at a time, in double precision.
    logits = torch.cat([model.eval()(image.unsqueeze(0)).detach().double() for image in images])
    predicted, probabilities, count = (
        logits.argmax(dim=1).tolist(),
        logits.exp() / logits.exp().sum(1, True),
        len(labels),
    )
    confusion = [[0] * 10 for _ in range(10)]
    for true, said in zip(labels.tolist(), predicted, strict=True):
        confusion[true][said] += 1
    loss = -sum(math.log(probabilities[n, labels[n]]) for n in range(count)) / count
    accuracy = 100 * sum(confusion[i][i] for i in range(10)) / count
    printed = re.findall(r"(\w+) loss: (\S+), (\w+) accuracy: (\S+)%", output)[-1]
    assert (printed[0], printed[2]) == (split, split)
    assert float(printed[1]) == pytest.approx(loss, abs=1e-4)
    assert float(printed[3]) == pytest.approx(accuracy, abs=0.006)
    lines = output.splitlines()
    assert f"and {count} {split.lower()} samples)" in lines[0]
    assert lines[-24].split() == ["Class", "Precision", "Recall", "F1", "Count"]
    for i, line in enumerate(lines[-23:-13]):
        name, *figures = line.split()
        hits, true, said = confusion[i][i], sum(confusion[i]), sum(row[i] for row in confusion)
        expected = [hits / max(said, 1), hits / max(true, 1), 2 * hits / max(said + true, 1), true]
        assert name == str(i)
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=1e-4)
    assert "row per true class, a column per predicted" in lines[-13]
    assert lines[-12].split() == list("0123456789")
    assert [[int(word) for word in line.split()] for line in lines[-11:-1]] == [[i, *confusion[i]] for i in range(10)]
    wrong = [n for n in range(count) if labels[n] != predicted[n]]
    assert lines[-1] == f"{file} shows {min(len(wrong), 100)} of {len(wrong)} mistakes."
    confidences = [100 * probabilities[n].max().item() for n in wrong]
    shown = [re.fullmatch(r"true: (\d)\nsaid: (\d)\n(.*)% sure", text).groups() for text in texts]
    assert [float(sure) for *_, sure in shown] == pytest.approx(sorted(confidences, reverse=True)[:100], abs=0.06)
    pairs = [(str(labels[n].item()), str(predicted[n])) for n in wrong]
    assert len(wrong) > 100 or sorted(pair for *pair, _ in shown) == sorted(map(list, pairs))


@each_script
@pytest.mark.parametrize("split", ["test", "validation"])
def test_each_epoch_reports_its_own_figures(script, split, train, data_dir, monkeypatch):
    file, confusion = data_dir / "log.csv", torch.eye(10, dtype=torch.int64)
    made_up = [
        common.Evaluation(loss, accuracy, confusion, None) for loss, accuracy in ((0.5, 0.9), (0.7, 0.8), (0.6, 0.85))
    ]
    monkeypatch.setattr(common, "evaluate", Mock(side_effect=made_up))
    file.write_text("of a former run")
    options = ["--validate", 50] if split == "validation" else []
    _, output = train(script, "--epochs", 3, "--log", file, *options)
    words = rf"{split.capitalize()} loss: (\S+), {split.capitalize()} accuracy: (\S+), Time: (\S+) s"
    lines = re.findall(words, output)
    assert [line[:2] for line in lines] == [("0.5000", "90.00%"), ("0.7000", "80.00%"), ("0.6000", "85.00%")]
    head, *rows = file.read_text().splitlines()
    assert head == f"epoch,train_loss,{split}_loss,{split}_accuracy,seconds"
    for i, row in enumerate(rows):
        epoch, train_loss, loss, accuracy, seconds = row.split(",")
        assert (int(epoch), float(loss), float(accuracy)) == (i + 1, made_up[i].loss, made_up[i].accuracy)
        assert 0 < float(train_loss) < 5
        assert seconds == lines[i][2]
    assert len(rows) == 3


@each_script
def test_loss_that_is_not_finite(script, data_dir, train, fail):
    file = data_dir / "weights.pt"
    train(script, "--epochs", 1, "--save", file)
    good = file.read_bytes()
    for options in (["--lr", "1e37"], ["--lr", "1e37", "--limit", 100]):  # seen in a step; seen only after the last one
        status, message, _ = fail(script, "--data-dir", data_dir, "--load", file, "--save", file, *options)
        assert status == 1
        assert re.search(r"the loss is (nan|inf) at epoch 1, step \d; try a smaller --lr", message)
        assert file.read_bytes() == good
    for loss in (math.inf, math.nan):
        with pytest.raises(common.UserError):
            common.check_finite(loss, 1, 1)
    with pytest.raises(common.UserError, match="not finite after epoch 7"):
        common.save_weights(Constant(1.0, math.inf), SimpleNamespace(save=file), SimpleNamespace(classes=["a", "b"]), 7)
    assert file.read_bytes() == good


class Brightness(nn.Module):
    """Says class 0, the surer the brighter the image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, images):
        return images.mean(dim=(1, 2, 3)).unsqueeze(1) * self.scale


def draw_errors(file, model, loader, classes=("zero", "one")):
    """Draw the mistakes; return the sheet's cells, uint8 (rows, columns, 3, height, width)."""
    common.draw_errors(file, common.evaluate(model, loader).logits, loader, classes)
    sheet = pil_to_tensor(Image.open(file))[:, 2:, 2:]  # make_grid's padding being 2
    width = sheet.shape[2] // min(10, sheet.shape[2] // 122)
    return sheet.unfold(1, 140, 142).unfold(2, width - 2, width).permute(1, 2, 0, 3, 4)


@each_device
def test_errors_most_confident_first(device, tmp_path, capsys):
    torch.manual_seed(0)
    images = torch.rand(130, 1, 28, 28, device=device) * torch.linspace(0.1, 1, 130, device=device).view(-1, 1, 1, 1)
    images = (images * 255).round() / 255
    labels = torch.ones(130, dtype=torch.int64, device=device)
    labels[-1] = 0  # the brightest is right
    file, model = tmp_path / "errors.png", Brightness().to(device)
    cells = draw_errors(file, model, common.Loader(images, labels, 50))
    assert capsys.readouterr().out == f"{file} shows 100 of 129 mistakes.\n"
    assert cells.shape[:2] == (10, 10)
    for place, image in ((0, images[128]), (1, images[127]), (99, images[29])):
        shown = cells[place // 10, place % 10, :, 4:88:3, 18:102:3]
        assert torch.equal(shown, (image * 255).round().to(torch.uint8).cpu().expand(3, -1, -1))
        assert (cells[place // 10, place % 10, 0, 90:] < 128).sum() > 100  # there is text below
    draw_errors(file, model, DataLoader(TensorDataset(images[:12], labels[:12]), batch_size=5))
    assert pil_to_tensor(Image.open(file))[0, -140:, -900:].min() == 255  # nothing where there are no more mistakes


def test_errors_in_colour_normalized_not_square_with_long_names(tmp_path):
    images = torch.zeros(2, 3, 14, 28)
    images[:, 0], images[:, 1, 7:] = 1, 0.5
    names = ["zero", "a class with a name of 37 letters 1990"]
    for batch in ((images - 0.5) / 0.25, torch.zeros(2, dtype=torch.int64)), (images, torch.ones(2, dtype=torch.int64)):
        (cell,) = draw_errors(tmp_path / "errors.png", Brightness(), [batch], names)[0, :1]
        assert cell.shape[2] > 84 + 36 + 100
        middle = cell.shape[2] // 2 - 18
        assert [cell[:, y, middle].tolist() for y in (5, 30, 60)] == [[255] * 3, [255, 0, 0], [255, 127, 0]]


def test_errors_without_a_mistake(tmp_path, capsys):
    loader = common.Loader(torch.rand(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64), 2)
    common.draw_errors(tmp_path / "errors.png", common.evaluate(Brightness(), loader).logits, loader, ["zero", "one"])
    assert "No mistakes" in capsys.readouterr().out
    assert not (tmp_path / "errors.png").exists()


def test_errors_in_a_format_of_the_reader_s_choice(train, data_dir):
    for suffix in ("png", "jpg", "webp", "pdf"):
        _, output = train(cnn_mnist, "--epochs", 1, "--errors", data_dir / f"errors.{suffix}")
        assert f"errors.{suffix} shows" in output
        assert (data_dir / f"errors.{suffix}").stat().st_size > 1000


@each_script
@pytest.mark.parametrize(("option", "folder", "names"), [
    ("fashion-mnist", "FashionMNIST", ["T-shirt/top", "Ankle boot"]),
    ("kmnist", "KMNIST", ["o", "wo"]),
])  # fmt: skip
def test_class_names(script, option, folder, names, data_dir, train, capsys):
    (data_dir / "MNIST").rename(data_dir / folder)
    file = data_dir / "weights.pt"
    _, output = train(script, "--dataset", option, "--epochs", 1, "--save", file)
    assert f"Data: {option} (" in output
    lines = output.splitlines()[-22:-12]
    assert [lines[0].rsplit(maxsplit=4)[0], lines[9].rsplit(maxsplit=4)[0]] == names
    assert max(map(len, output.splitlines()[2:])) < 80
    draw_page(7).save(data_dir / "7.png")
    script.main(["--load", str(file), "--predict", str(data_dir / "7.png")])
    answer = re.fullmatch(r".*7\.png: (.*) \(.*%\)\n", capsys.readouterr().out)
    assert answer[1] in getattr(datasets, folder).classes


# ---- data of one's own ----


class Own(nn.Module):
    """Colour images (N, 3, H, W), or sequences (N, T, 5), to logits (N, 3), with dropout and batch normalization."""

    def __init__(self, *_):
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(), nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x.flatten(2).mean(dim=1) if x.dim() == 3 else x.mean(dim=(2, 3)))


@pytest.fixture
def own(monkeypatch):
    """A function that puts data of one's own, and a network for it, in a script's place."""

    def own(script, shape, classes, outputs=3):
        def split(count):
            return DataLoader(TensorDataset(torch.randn(count, *shape), torch.arange(count) % 3), batch_size=8)

        def model(*_):
            model = Own()
            model.layers[4] = nn.Linear(8, outputs)
            model(torch.randn(2, *shape))
            return model

        model.__name__ = "Own"
        monkeypatch.setattr(script, script.__name__[:3].upper(), model)
        monkeypatch.setattr(common, "load_data", lambda args: common.Data(split(60), split(30), classes))

    return own


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (12, 5)], ids=["colour images", "sequences"])
def test_nothing_untrue_is_said_of_data_of_one_s_own(script, shape, own, tmp_path, train, fail, capsys):
    names, file = ["a long name of thirty letters.", "two words", "c"], tmp_path / "weights.pt"
    own(script, shape, names)
    _, output = train(script, "--epochs", 1, "--save", file, "--errors", tmp_path / "errors.png")
    assert "Model: Own (" in output
    assert "Data: data of your own (60 training and 30 test samples)" in output
    assert "mnist" not in output
    table = output[output.index("Class ") :].splitlines()
    assert [line.rsplit(maxsplit=4)[0].strip() for line in table[1:4]] == names
    assert [line.split()[-1] for line in table[1:4]] == ["10"] * 3
    assert torch.load(file)["classes"] == names
    draw_page(7).save(tmp_path / "7.png")
    status, message, _ = fail(script, "--load", file, "--predict", tmp_path / "7.png")
    assert status == 1
    assert "takes grey pictures of 28x28 pixels" in message
    if len(shape) == 2:
        status, message, _ = fail(script, "--augment")
        assert status == 1
        assert "--augment takes images (N, C, H, W), not (8, 12, 5)" in message


@each_script
def test_names_that_are_not_one_for_each_output(script, own, fail):
    for classes, outputs in ((["a", "b"], 3), (["a", "b", "c"], 10)):
        own(script, (3, 32, 32), classes, outputs)
        status, message, output = fail(script, "--epochs", 1)
        assert (status, output) == (1, "")
        assert f"the network has {outputs} outputs, but {len(classes)} classes have a name" in message


# ---- files: saved weights ----


@each_script
@each_device
def test_save_and_load(script, device, train, tmp_path):
    file = tmp_path / "weights.pt"
    model, output = train(script, "--device", device, "--epochs", 2, "--save", file)
    loaded, evaluated = train(script, "--device", device, "--epochs", 0, "--load", file)
    assert same_weights(model, loaded)
    assert accuracies(evaluated) == accuracies(output)[-1:]
    assert "finished" not in evaluated
    continued, _ = train(script, "--device", device, "--epochs", 1, "--load", file)
    assert not same_weights(model, continued)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST", "weights.pt"] or os.listdir(tmp_path) == [
        "weights.pt",
        "MNIST",
    ]


def test_load_takes_the_sizes_from_the_file(train, fail, tmp_path):
    file = tmp_path / "weights.pt"
    train(rnn_mnist, "--epochs", 1, "--hidden", 16, "--layers", 1, "--save", file)
    model, _ = train(rnn_mnist, "--epochs", 0, "--load", file)
    assert (model.lstm.hidden_size, model.lstm.num_layers) == (16, 1)
    train(rnn_mnist, "--epochs", 0, "--load", file, "--hidden", 16)
    status, message, _ = fail(rnn_mnist, "--load", file, "--hidden", 128)
    assert status == 1
    assert f"{file} holds RNN --hidden 16 --layers 1" in message
    assert "this is RNN --hidden 128 --layers 1" in message


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=repr)
def test_a_save_replaces_the_file_or_leaves_it(error, tmp_path, train, monkeypatch):
    file, link = tmp_path / f"{'weights' * 34}.pt", tmp_path / "link"  # with an ending of its own it would be too long
    train(cnn_mnist, "--epochs", 1, "--save", file)
    link.hardlink_to(file)
    former, write = file.read_bytes(), Path.write_bytes
    train(cnn_mnist, "--epochs", 2, "--save", file)
    latter = file.read_bytes()
    assert latter != link.read_bytes() == former  # replaced, not written over

    def fail_half_way(path, content):
        write(path, content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    with pytest.raises((common.UserError, KeyboardInterrupt)):
        train(cnn_mnist, "--epochs", 1, "--save", file)
    assert file.read_bytes() == latter
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "link", "MNIST"}


@posix
def test_a_save_keeps_links_and_modes(tmp_path, train):
    file, link = tmp_path / "weights.pt", tmp_path / "link.pt"
    train(cnn_mnist, "--epochs", 1, "--save", file)
    umask = os.umask(0o022)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    link.symlink_to(file)
    for mode in (0o600, 0o640):
        file.chmod(mode)
        former = file.read_bytes()
        train(cnn_mnist, "--epochs", 1, "--seed", mode, "--save", link)
        assert link.is_symlink()
        assert file.read_bytes() != former
        assert file.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("option", ["--save", "--errors", "--log"])
@pytest.mark.parametrize(
    "place", ["missing/file.png", ".", "file/file.png", "pipe.png", "loop.png", "/", "x.psd", "x.abc"]
)
def test_a_place_that_cannot_be_written(option, place, data_dir, fail):
    if place.startswith("x.") and option != "--errors":
        pytest.skip("any ending does")
    (data_dir / "file").touch()
    (data_dir / "loop.png").symlink_to(data_dir / "loop.png")
    getattr(os, "mkfifo", os.mkdir)(data_dir / "pipe.png")  # what is no plain file, such as /dev/null, is not replaced
    status, message, output = fail(cnn_mnist, "--data-dir", data_dir, option, data_dir / place)
    assert (status, output) == (1, "")  # before the first step
    assert f"cannot write {data_dir / place} (" in message


class Trace:
    """What a harmful file would hold: unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def crafted(saved, trace):
    """Files of other forms, each as bytes or as what torch.save is given."""
    weights = saved["weights"]
    first = next(iter(weights))
    yield from (b"seven", b"", pickle.dumps(Trace(trace)), {"weights": Trace(trace)}, torch.zeros(3), weights, [], None)
    yield from (list(saved), set(saved), {**saved, "further": 1}, {**saved, "model": 1})
    yield from ({name: saved[name] for name in saved if name != missing} for missing in saved)
    bad_sizes = [
        None,
        1,
        [16],
        "16",
        {"hidden": "16"},
        {"hidden": -1},
        {"hidden": 2**63},
        {"hidden": 1.5},
        {"epochs": 1},
    ]
    yield from ({**saved, "sizes": sizes} for sizes in bad_sizes)
    yield from ({**saved, "classes": classes} for classes in (None, 10, "0123456789", list(range(10)), {"0": 1}))
    bad_weights = [
        None,
        [],
        {0: torch.zeros(1)},
        {first: None},
        {first: 1},
        {**weights, first: weights[first] * math.nan},
    ]
    yield from ({**saved, "weights": bad} for bad in [*bad_weights, {**weights, first: weights[first] / 0}])


def test_load_refuses_another_file(tmp_path, train, fail):
    file, trace = tmp_path / "weights.pt", tmp_path / "trace"
    train(cnn_mnist, "--epochs", 1, "--save", file)
    whole = file.read_bytes()
    middle = whole.index(torch.load(file)["weights"]["fc.weight"].numpy().tobytes()) + 1000
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:-1000], flipped, *crafted(torch.load(file), trace)):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        status, message, _ = fail(cnn_mnist, "--load", file)
        assert status == 1
        assert f"{file} is damaged, or no file that --save wrote" in message
        assert not trace.exists()


def test_load_refuses_the_weights_of_another_network(tmp_path, train, fail):
    file = tmp_path / "weights.pt"
    for script, other in (SCRIPTS, reversed(SCRIPTS)):
        train(script, "--epochs", 1, "--save", file)
        status, message, _ = fail(other, "--load", file)
        assert status == 1
        assert f"{file} holds {'CNN' if script is cnn_mnist else 'RNN --hidden 128 --layers 2'}, which" in message
        assert f"this is {'RNN' if script is cnn_mnist else 'CNN'}" in message
        saved = torch.load(file)
        kept = {name: tensor for name, tensor in saved["weights"].items() if name != "fc.bias"}
        for edited in (kept, {**kept, "fc.bias": torch.zeros(11)}, {**saved["weights"], "fc2.bias": torch.zeros(1)}):
            torch.save({**saved, "weights": edited}, file)
            status, message, _ = fail(script, "--load", file)
            assert status == 1
            assert "does not fit here" in message
        torch.save({**saved, "classes": ["0", "1"]}, file)
        draw_page(7).save(tmp_path / "7.png")
        status, message, _ = fail(script, "--load", file, "--predict", tmp_path / "7.png")
        assert status == 1
        assert "the network has 10 outputs, but 2 classes have a name" in message


@posix
def test_files_to_read_that_are_no_files(tmp_path, train, fail):
    os.mkfifo(tmp_path / "pipe")
    train(cnn_mnist, "--epochs", 1, "--save", tmp_path / "weights.pt")
    for name, words in (("missing", "No such file"), ("pipe", "not a regular file"), (".", "not a regular file")):
        status, message, _ = fail(cnn_mnist, "--load", tmp_path / name)
        assert status == 1
        assert f"cannot read {tmp_path / name} (" in message
        assert words in message
        status, message, _ = fail(cnn_mnist, "--load", tmp_path / "weights.pt", "--predict", tmp_path / name)
        assert status == 1
        assert f"cannot read a digit from {tmp_path / name}: " in message
        assert words in message


def test_weights_saved_on_a_gpu_load_on_a_cpu(tmp_path, train, monkeypatch):
    file = tmp_path / "weights.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")  # as if they lay there
        model, _ = train(cnn_mnist, "--epochs", 1, "--save", file)
    assert same_weights(train(cnn_mnist, "--epochs", 0, "--load", file)[0], model)


# ---- pictures of your own ----


def draw_page(digit, size=200, page=(500, 400), at=(250, 120), ink=0, paper=255):
    """A picture of one digit, dark on light, off the middle."""
    picture = Image.new("L", page, paper)
    ImageDraw.Draw(picture).text(at, str(digit), fill=ink, font=ImageFont.load_default(size=size))
    return picture


def lit_from_the_left(picture):
    return to_pil_image((pil_to_tensor(picture) * torch.linspace(1, 0.4, picture.width)).to(torch.uint8))


def on_glass(picture, ink):
    glass = Image.new("RGBA", picture.size, (ink, ink, ink, 0))
    glass.putalpha(ImageOps.invert(picture))
    return glass


def with_clear_frame(picture):
    framed = Image.new("RGBA", (picture.width + 40, picture.height + 40), (0, 0, 0, 0))
    framed.paste(picture, (20, 20))
    return framed


def turned_by_exif(picture):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # orientation: to be shown turned a quarter clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif)
    return Image.open(file)


def with_wide_pixels(picture, mode, raw, dtype, factor):
    values = (pil_to_tensor(picture)[0].double() * factor).numpy().astype(dtype)
    return Image.frombytes(mode, picture.size, values.tobytes(), "raw", raw)


FORMS = {
    "elsewhere": lambda digit: draw_page(digit, at=(20, 150)),
    "on a larger page": lambda digit: draw_page(digit, page=(900, 1300)),
    "small": lambda digit: draw_page(digit, size=100),
    "light on dark": lambda digit: ImageOps.invert(draw_page(digit)),
    "pencil": lambda digit: draw_page(digit, ink=140, paper=200),
    "lit from the left": lambda digit: lit_from_the_left(draw_page(digit)),
    "dark on glass": lambda digit: on_glass(draw_page(digit), 0),
    "light on glass": lambda digit: on_glass(draw_page(digit), 255),
    "with a clear frame": lambda digit: with_clear_frame(draw_page(digit)),
    "turned by EXIF": lambda digit: turned_by_exif(draw_page(digit)),
    "32 bits": lambda digit: with_wide_pixels(draw_page(digit, ink=100, paper=220), "I", "I", "<i4", 65_537),
    "16 bits big-endian": lambda digit: with_wide_pixels(draw_page(digit), "I;16B", "I;16B", ">u2", 257),
    "float": lambda digit: with_wide_pixels(draw_page(digit), "F", "F", "<f4", 1 / 3),
    "palette": lambda digit: draw_page(digit).convert("P"),
    "colour": lambda digit: ImageOps.colorize(draw_page(digit), "darkred", "lightyellow"),
}


@pytest.mark.parametrize("form", FORMS)
def test_picture_of_any_form(form, tmp_path):
    for digit in (2, 4, 7):
        draw_page(digit).save(tmp_path / "plain.png")
        picture = FORMS[form](digit)
        name = "other.tiff" if picture.mode[0] in "IF" else "other.png"
        picture.save(tmp_path / name, exif=picture.getexif())
        plain, other = common.read_picture(tmp_path / "plain.png"), common.read_picture(tmp_path / name)
        assert plain.shape == other.shape == (1, 28, 28)
        assert (plain.min(), plain.max()) == (0, 1)
        rows, columns = (plain[0].any(dim=dim).nonzero() for dim in (1, 0))
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 == 20
        # Rounding may put the centre of mass one pixel further.
        shifted = [other.roll((y, x), dims=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        assert min((plain - image).abs().sum() for image in shifted) < 0.25 * plain.sum()


def test_picture_is_upright_and_its_centre_of_mass_where_mnist_has_it():
    for digit in range(10):
        page = draw_page(digit)
        image = common.mnist_form(common.grey_levels(page))[0]
        for dim in (0, 1):
            assert image.sum(dim=dim) @ torch.arange(28.0) / image.sum() == pytest.approx(14, abs=0.51)
        drawn = ImageOps.invert(page).crop(ImageOps.invert(page).getbbox())
        drawn.thumbnail((20, 20), Image.Resampling.BILINEAR)
        rows, columns = (image.any(dim=dim).nonzero() for dim in (1, 0))
        found = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        expected = pil_to_tensor(drawn.resize(found.T.shape, Image.Resampling.BILINEAR))[0] / 255
        assert (found - expected).abs().mean() < 0.1
        if digit in (2, 4, 5, 7):  # those that look otherwise when mirrored
            assert all((found.flip(dim) - expected).abs().mean() > 0.2 for dim in ((0,), (1,)))


@each_script
def test_predict(script, data_dir, train, fail, capsys):
    """The pictures that can be read are answered, the others are named in the end. No data set is needed."""
    file = data_dir / "weights.pt"
    model, _ = train(script, "--epochs", 10, "--batch-size", 25, "--lr", 0.003, "--save", file)
    wanted = ""
    for digit in range(3):
        draw_page(digit).save(data_dir / f"{digit}.png")
        logits = model(common.read_picture(data_dir / f"{digit}.png").unsqueeze(0))
        confidence, label = logits.softmax(dim=1).max(dim=1)
        wanted += f"{data_dir / str(digit)}.png: {label.item()} ({confidence.item():.1%})\n"
    Image.new("L", (300, 200), 250).save(data_dir / "blank.png")
    Image.linear_gradient("L").save(data_dir / "gradient.png")
    Image.linear_gradient("L").point(lambda level: 255 * (level > 127)).rotate(90).save(data_dir / "half.png")
    with_wide_pixels(draw_page(7), "F", "F", "<f4", math.nan).save(data_dir / "nan.tiff")
    (data_dir / "text.png").write_text("seven")
    bad = {"blank.png": "there is nothing on it", "text.png": "cannot identify", "missing.png": "No such file"}
    bad |= {"gradient.png": "all along", "half.png": "all along", "nan.tiff": "not a finite number"}
    options = ["--data-dir", data_dir / "missing", "--load", file]
    script.main([str(option) for option in [*options, "--predict", data_dir / "0.png"]])
    assert capsys.readouterr().out == wanted.splitlines(keepends=True)[0]
    names = ["0.png", *bad, "1.png", "2.png"]
    status, message, output = fail(script, *options, "--predict", *(data_dir / name for name in names))
    assert (status, output) == (1, wanted)
    for name, reason in bad.items():
        assert f"cannot read a digit from {data_dir / name}: " in message
        assert reason in message


def test_picture_that_is_too_large(tmp_path, monkeypatch, recwarn):
    draw_page(7).save(tmp_path / "7.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 * 400 - 1)
    common.read_picture(tmp_path / "7.png")  # Pillow only warns over its limit
    assert not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 * 400 // 2 - 1)
    with pytest.raises(common.UserError, match="exceeds limit"):
        common.read_picture(tmp_path / "7.png")
