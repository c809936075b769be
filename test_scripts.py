"""Tests of the scripts, on the CPU and on the machine's accelerator where it has one: python -m pytest

They need no network. Those that need the real MNIST use ./data, and are skipped where it is not there.
"""

import errno
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
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import cnn_mnist
import common
import rnn_mnist

HERE = Path(__file__).parent
DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)

# On a machine busy with other things, two threads wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the tests start

each_script = pytest.mark.parametrize("script", [cnn_mnist, rnn_mnist], ids=["cnn_mnist", "rnn_mnist"])
each_device = pytest.mark.parametrize("device", DEVICES)
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and modes as POSIX has them")


def write_idx(path, values):
    """Write a tensor as an IDX file: 0, 0, type, dimensions, each size in 4 bytes big-endian, the values so too."""
    kind, dtype = (8, "u1") if values.dtype == torch.uint8 else (12, ">i4")
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, kind, values.dim()]) + sizes + values.numpy().astype(dtype).tobytes())


@pytest.fixture
def data_dir(tmp_path):
    """A folder with a small MNIST of drawn digits: 250 training and 130 test images."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for split, count in (("train", 250), ("t10k", 130)):
        images, labels = common.draw_digits(count, generator)
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels.to(torch.uint8))
    return tmp_path


@pytest.fixture
def train(data_dir, capsys):
    """A function that trains in this process on the small MNIST, and returns the model and what was printed."""

    def train(script, *options, model=None):
        model, _ = script.main(["--data-dir", data_dir, "--device", "cpu", *options], model)
        return model, capsys.readouterr().out

    return train


@pytest.fixture
def fail(monkeypatch, capsys):
    """A function that runs a command line in this process, which has to end so; it returns the message and stdout."""

    def fail(script, *options, says, status=1):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            common.run(script.main)
        output, message = capsys.readouterr()
        if isinstance(exit.value.code, str):  # which Python prints, and ends with status 1
            message, exit.value.code = message + exit.value.code + "\n", 1
        assert exit.value.code == status
        assert says in message
        assert status == 2 or message.count("\n") == 1
        assert "delete" not in message
        return message, output

    return fail


def start(script, *options, stdout=subprocess.PIPE, **variables):
    """Start a script as a process of its own, its output buffered as Python does by default, and heeding Ctrl-C."""
    command = [sys.executable, HERE / f"{script.__name__}.py", *map(str, options)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables
    heed = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    return subprocess.Popen(command, text=True, env=env, preexec_fn=heed, stdout=stdout, stderr=subprocess.PIPE)


def load_data(*options):
    """The data that the options ask for, on the CPU where they do not say otherwise."""
    return common.load_data(common.parse_args(common.make_parser(""), ["--device", "cpu", *options]))


def mnist(data_dir, train=False):
    """The images (N, 1, 28, 28) and labels (N,) of a split, as torchvision gives them one by one."""
    images, labels = zip(*datasets.MNIST(data_dir, train=train, transform=transforms.ToTensor()), strict=True)
    return torch.stack(images), torch.tensor(labels)


def printed(output, word):
    """The figures that follow a word in the output, in its order."""
    return [float(figure) for figure in re.findall(rf"{word}: (\d\S*\d)", output)]


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def record(monkeypatch, owner, name, what):
    """Return a list to which each call of owner.name adds what(*its arguments), and then goes on as before."""
    seen, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (seen.append(what(*a, **k)), original(*a, **k))[1])
    return seen


# ---- the scripts ----


@each_script
@each_device
def test_smoke_one_batch(script, device, train):
    before, _ = train(script, "--device", device, "--epochs", 0)
    after, output = train(script, "--device", device, "--epochs", 1, "--limit", 100)
    assert [math.isfinite(loss) for loss in printed(output, " Loss")] == [True]
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert not torch.equal(old, new)


@each_script
@each_device
@pytest.mark.parametrize("option", ["--epochs=2", "--one-cycle", "--augment", "--amp"])
def test_same_seed_same_weights(script, device, option, train):
    options = ["--device", device, "--epochs", 2, "--limit", 100, "--batch-size", 32]
    model, _ = train(script, *options, option)
    assert same_weights(model, train(script, *options, option)[0])
    assert not same_weights(model, train(script, *options, option, "--seed", 1)[0])
    assert same_weights(model, train(script, *options)[0]) == (option == "--epochs=2")
    first, second = (train(script, "--epochs", 0, "--seed", seed)[0] for seed in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.backends.cudnn.deterministic and torch.backends.mkldnn.deterministic  # or a GPU may not repeat it
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ


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
    """As the loop below does, which is written out once more, and evaluates nothing."""
    trained, output = train(script, "--epochs", 2, "--log", data_dir / "log.csv")
    model, _ = train(script, "--epochs", 0)
    loader = load_data("--data-dir", data_dir).train_loader
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    rows = (data_dir / "log.csv").read_text().splitlines()[1:]
    for shown, row in zip(printed(output, " Loss"), rows, strict=True):
        losses = []
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert shown == pytest.approx(losses[-1], abs=2e-4)
        assert float(row.split(",")[1]) == pytest.approx(sum(losses) / 3, abs=1e-4)
    for expected, weights in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(weights, expected, atol=1e-5)
    args = common.parse_args(common.make_parser(""), [])
    assert (args.epochs, args.batch_size, args.seed, args.dataset, args.data_dir) == (10, 100, 0, "mnist", "data")


@each_script
def test_what_the_readme_calls_fast(script, train, monkeypatch):
    fused = record(monkeypatch, torch.optim.Adam, "step", lambda self, *_: self.param_groups[0]["fused"])
    model, _ = train(script, "--epochs", 1)
    assert fused == [True] * 3
    if script is cnn_mnist:
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        images, pool = torch.rand(4, 1, 28, 28), nn.MaxPool2d(2)
        x = pool(model.conv2(pool(model.conv1(images).relu())).relu())
        assert torch.equal(model(images), model.fc(x.flatten(1)))  # the same, though pooling came first


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_is_kept_for_the_next_step(data_dir):
    program = """import resource, sys, rnn_mnist
def faults(epochs):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rnn_mnist.main([*sys.argv[1:], "--epochs", epochs])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(-faults(1) + faults(11))"""
    command = [sys.executable, "-c", program, "--data-dir", data_dir, "--device", "cpu"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout
    assert int(output.split()[-1]) < 30 * 500  # 30 steps more; 9,000 each where memory is given back


@each_script
@pytest.mark.parametrize(("options", "peak"), [([], 0.01), (["--lr", 0.002], 0.002)], ids=str)
def test_one_cycle(script, options, peak, train, monkeypatch):
    def cosine(first, last, steps):
        return [last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]

    groups = record(monkeypatch, torch.optim.Adam, "step", lambda self, *_: dict(self.param_groups[0]))
    # 5 epochs of 4 steps, of which the last is smaller; the peak after 30% of the steps
    train(script, "--one-cycle", "--epochs", 5, "--batch-size", 30, "--limit", 100, *options)
    rates = [*cosine(peak / 25, peak, 5), *cosine(peak, peak / 250_000, 14), peak / 250_000]
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    momenta = [*cosine(0.95, 0.85, 5), *cosine(0.85, 0.95, 14), 0.95]
    assert [group["betas"][0] for group in groups] == pytest.approx(momenta)
    train(script, "--one-cycle", "--epochs", 1, "--limit", 1)
    train(script, "--one-cycle", "--epochs", 0)


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
def test_amp(script, device, train, monkeypatch, fail):
    dtypes = record(monkeypatch, nn.CrossEntropyLoss, "forward", lambda self, logits, _: logits.dtype)
    model, _ = train(script, "--device", device, "--epochs", 1, "--amp")
    assert dtypes == [torch.bfloat16] * 3
    assert all(p.dtype == torch.float32 for p in model.parameters())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    fail(script, "--amp", "--device", "cpu", says="argument --amp: a CPU without AVX-512 is many", status=2)


def test_synthetic_digits_are_learned(capsys):
    # With a rate that falls to 0, the last steps depend little on how a machine rounds.
    rnn_mnist.main(["--dataset", "synthetic", "--limit", 30000, "--epochs", 1, "--batch-size", 50, "--one-cycle"])
    assert printed(capsys.readouterr().out, "accuracy")[0] >= 98


@pytest.mark.skipif(not (HERE / "data/MNIST/raw/train-images-idx3-ubyte").is_file(), reason="MNIST is not in ./data")
def test_real_mnist_is_learned(capsys):
    _, evaluation = cnn_mnist.main(["--data-dir", HERE / "data", "--epochs", 1])
    assert 0.96 <= evaluation.accuracy < 1
    assert printed(capsys.readouterr().out, "accuracy") == [pytest.approx(100 * evaluation.accuracy)]


@each_script
@each_device
def test_a_network_handed_in_is_the_one_that_is_trained(script, device, train, monkeypatch):
    torch.manual_seed(5)
    mine = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))
    weight, copy = mine[2].weight, mine[2].weight.clone()
    model, output = train(script, "--device", device, "--epochs", 1, model=mine)
    assert model is mine
    assert "Model: Sequential (9,418 parameters)" in output  # 2*784 + 784*10 + 10
    assert (weight.cpu() - copy).abs().max() > 0.001
    learned = mine[2].weight.clone()
    monkeypatch.setattr(common, "end_epoch", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(script, "--device", device, model=mine)
    assert not torch.equal(mine[2].weight, learned)  # after an interrupt it is what it then was


@each_script
def test_bug_softmax_before_cross_entropy_loss(script, train):
    # With softmax twice the loss of ten classes stays above ln(e + 9) - 1 = 1.46, also on a batch learned by heart.
    _, output = train(script, "--limit", 10, "--epochs", 120, "--lr", 0.003)
    assert printed(output, " Loss")[-1] < 0.5


def test_bug_classifier_input_size():
    assert cnn_mnist.CNN()(torch.rand(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("model_class", [cnn_mnist.CNN, rnn_mnist.RNN])
@each_device
def test_bug_batch_taken_for_time(model_class, device):
    model, images = model_class().to(device), torch.rand(5, 1, 28, 28, device=device)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-3)  # a GPU may round to TF32


def test_bug_last_batch_row_taken_for_last_time_step():
    model, images = rnn_mnist.RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(images.squeeze(1))  # (2, 3, 128): each layer's, after the last of the rows from the top
    assert torch.allclose(model(images), model.fc(hidden[-1]), atol=1e-6)


@each_script
def test_bug_undefined_names(script, data_dir):
    process = start(script, "--data-dir", data_dir, "--epochs", 2, "--device", "cpu")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    header, *lines = output.splitlines()
    model = "CNN (20,490" if script is cnn_mnist else "RNN (214,282"
    data = "Data: mnist (250 training and 130 test samples)"
    assert header == f"Device: cpu, Model: {model} parameters), {data}"
    for epoch in ("1", "2"):
        assert re.fullmatch(rf"Epoch \[{epoch}/2\], Step \[3/3\], Loss: \d\.\d{{4}}", lines.pop(0))
        result = rf"Epoch \[{epoch}/2\], Test loss: \d\.\d{{4}}, Test accuracy: \d+\.\d\d%, Time: \d+\.\d\d s"
        assert re.fullmatch(result, lines.pop(0))
    assert lines.pop(0) == "Training finished."


@each_script
@pytest.mark.parametrize("options", ["--epochs 2", "--epochs 2 --augment", "--epochs 0", "--epochs 1 --validate 120"])
def test_bug_test_set_never_evaluated(script, options, data_dir, capsys, monkeypatch):
    """Every figure of the report and of the mistakes, worked out anew, one image at a time, in double precision."""
    texts = record(monkeypatch, ImageDraw.ImageDraw, "multiline_text", lambda self, at, text, *_, **__: text)
    file, split = data_dir / "errors.PNG", "Validation" if "validate" in options else "Test"
    options = [*options.split(), "--data-dir", data_dir, "--device", "cpu", "--batch-size", 10, "--lr", 0.003]
    model, evaluation = script.main([*options, "--errors", file])
    output = capsys.readouterr().out
    images, labels = (part[-120:] for part in mnist(data_dir, train=True)) if split != "Test" else mnist(data_dir)
    logits = torch.cat([model.eval()(image.unsqueeze(0)).detach().double() for image in images])
    shares, labels, predicted = logits.softmax(dim=1), labels.tolist(), logits.argmax(dim=1).tolist()
    confusion, count = [[0] * 10 for _ in range(10)], len(labels)
    for label, said in zip(labels, predicted, strict=True):
        confusion[label][said] += 1
    wrong = [n for n in range(count) if labels[n] != predicted[n]]
    loss, accuracy = re.findall(rf"{split} loss: (\S+), {split} accuracy: (\S+)%", output)[-1]
    expected = -sum(math.log(shares[n, labels[n]]) for n in range(count)) / count
    assert (float(loss), evaluation.loss) == pytest.approx((expected, expected), abs=1e-4)
    assert float(accuracy) == pytest.approx(100 - 100 * len(wrong) / count, abs=0.006)
    assert evaluation.accuracy == (count - len(wrong)) / count
    assert (evaluation.confusion.tolist(), evaluation.labels.tolist()) == (confusion, labels)
    assert torch.allclose(evaluation.logits.double(), logits, atol=1e-4)
    lines = output.splitlines()
    training = {"0": "", "1": "130 training and ", "2": "250 training and "}[options[1]]
    assert lines[0].endswith(f"({training}{count} {split.lower()} samples)")
    assert ("Training finished." in output) == (options[1] != "0")
    assert lines[-24].split() == ["Class", "Precision", "Recall", "F1", "Count"]
    for i, line in enumerate(lines[-23:-13]):
        hits, true, said = confusion[i][i], sum(confusion[i]), sum(row[i] for row in confusion)
        expected = [i, hits / max(said, 1), hits / max(true, 1), 2 * hits / max(said + true, 1), true]
        assert [float(word) for word in line.split()] == pytest.approx(expected, abs=1e-4)
    assert "a row per true class, a column per predicted class" in lines[-13]
    assert lines[-12].split() == list("0123456789")
    assert [[int(word) for word in line.split()] for line in lines[-11:-1]] == [[i, *confusion[i]] for i in range(10)]
    assert lines[-1] == f"{file} shows {min(len(wrong), 100)} of {len(wrong)} mistakes."
    shown = [re.fullmatch(r"true: (\d)\nsaid: (\d)\n(.*)% sure", text).groups() for text in texts]
    wrong = sorted(wrong, key=lambda n: -shares[n].max())[:100]
    assert [float(sure) for *_, sure in shown] == pytest.approx([100 * shares[n].max().item() for n in wrong], abs=0.06)
    said = sorted(f"{label}{said}" for label, said, _ in shown)  # sorted, as two may be equally sure
    assert said == sorted(f"{labels[n]}{predicted[n]}" for n in wrong)


def test_bug_steps_counted_without_the_last_batch(train):
    for batch_size, steps in ((100, ["3/3"]), (2, ["100/125", "125/125"]), (1000, ["1/1"]), (125, ["2/2"])):
        _, output = train(cnn_mnist, "--epochs", 1, "--batch-size", batch_size)
        assert re.findall(r"Step \[(.*)\]", output) == steps


# ---- the process ----


@each_script
@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_in_a_notebook_and_an_ide(script, launcher, data_dir, monkeypatch):
    """Where stdout is not a terminal's or a file's, all errors go through, and a command line is the kernel's."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=len, flush=bool))
    monkeypatch.setattr(sys, "argv", [f"/usr/lib/{launcher}", "-f", "/tmp/kernel.json"])
    error = common.UserError("no data")
    monkeypatch.setattr(common, "load_data", Mock(side_effect=[error, KeyboardInterrupt, error]))
    with pytest.raises(common.UserError) as raised:
        common.run(script.main)
    assert raised.value._render_traceback_() == ["error: no data"]  # IPython shows that in place of a traceback
    with pytest.raises(KeyboardInterrupt):
        common.run(script.main)
    args = common.load_data.call_args.args[0]
    assert (args.epochs, args.dataset, args.save) == (10, "mnist", None)
    with pytest.raises(common.UserError):
        script.main(["--epochs", 3])
    assert common.load_data.call_args.args[0].epochs == 3
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--data-dir", str(data_dir), "--epochs", "0"])
    model, evaluation = common.run(script.main)
    assert isinstance(model, nn.Module)
    assert evaluation.labels.tolist() == mnist(data_dir)[1].tolist()


def test_an_error_in_the_reader_s_own_code_keeps_its_traceback():
    picture = Image.UnidentifiedImageError("cannot identify image file 'allocate.png'")
    for error in (RuntimeError("shapes"), TypeError("unsupported"), FileNotFoundError(2, "none", "my.csv"), picture):
        with pytest.raises(type(error)) as raised:
            common.run(Mock(side_effect=error))
        assert raised.value is error


def test_time_is_that_of_training_alone_until_the_device_is_done(train, monkeypatch):
    def pass_seconds(seconds):
        return lambda *_: now.append(now.pop() + seconds)

    now = [0]
    for module in (common, cnn_mnist, rnn_mnist):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    record(monkeypatch, torch.optim.Adam, "step", pass_seconds(1))
    record(monkeypatch, common, "evaluate", pass_seconds(100))
    record(monkeypatch, torch.Tensor, "mean", pass_seconds(1000))  # of the losses, which the device has by then
    for script in (cnn_mnist, rnn_mnist):
        assert printed(train(script, "--epochs", 2)[1], "Time") == [1003, 1003]


@posix
@each_script
def test_interrupt_in_the_middle_of_an_epoch(script, data_dir):
    # All that it would print is less than Python's buffer holds: the lines come at once, or not before its end.
    with start(script, "--data-dir", data_dir, "--batch-size", 1, "--epochs", 30) as process:
        assert process.stdout.readline().startswith("Device")
        assert "Step [100/250]" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "Interrupted.\n")


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_behind_the_output(unbuffered, data_dir):
    with start(cnn_mnist, "--data-dir", data_dir, "--epochs", 1000, PYTHONUNBUFFERED=unbuffered) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


# ---- options ----


@pytest.mark.parametrize(("options", "words"), [
    *((f"{name} {value}", f"argument {name}:") for name in ("--epochs", "--seed") for value in ("1.5", "x", "''")),
    *((f"{name} {value}", f"argument {name}:") for value in ("0", "1.5", "x")
      for name in ("--batch-size", "--limit", "--validate", "--hidden", "--layers")),
    ("--lr x", "argument --lr:"), ("--dataset emnist", "synthetic"), ("--predict 7.png", "see --load"),
    ("--errors mistakes.jpg", "end in .png"), ("--device gpu", "gpu cannot be used: Expected one of cpu, cuda"),
    ("--device meta", "meta cannot be used: Tensor.item() cannot be called on meta tensors; try --device cpu"),
])  # fmt: skip
def test_wrong_command_line(options, words, fail):
    fail(rnn_mnist, *options.split(), "--data-dir", __file__, says=words, status=2)


def test_device(fail, monkeypatch):
    gpu = Mock(**{"current_accelerator.return_value": torch.device("xpu")})
    monkeypatch.setattr(torch, "accelerator", gpu)
    monkeypatch.setattr(torch, "ones", Mock(return_value=torch.tensor(1.0)))
    assert common.find_device("auto") == torch.device("xpu")
    torch.ones.assert_called_with(1, device="xpu")
    assert common.find_device("cuda:1") == torch.device("cuda:1")
    broken = RuntimeError("no kernel image is available\nCUDA kernel errors might ... . Compile with ...")
    monkeypatch.setattr(torch, "ones", Mock(side_effect=broken))
    fail(cnn_mnist, says="xpu cannot be used: no kernel image is available CUDA kernel", status=2)
    gpu.is_available.return_value = False
    monkeypatch.setattr(torch, "ones", Mock(return_value=torch.tensor(1.0)))
    assert common.find_device("auto") == torch.device("cpu")


@each_script
@pytest.mark.parametrize("option", ["--save", "--errors", "--log"])
def test_a_place_that_cannot_be_written(script, option, data_dir, fail):
    (data_dir / "folder.png").mkdir()
    for place in ("missing/file.png", "folder.png"):
        _, output = fail(script, "--data-dir", data_dir, option, data_dir / place, says=f"cannot write {data_dir}")
        assert output == ""  # before the first step


# ---- data ----


def test_order_and_limits_of_the_images(data_dir):
    def order(loader):  # (N, 28*28)
        return torch.cat([images.cpu().flatten(1) for images, _ in loader])

    first, second, other = (load_data("--data-dir", data_dir, "--seed", seed).train_loader for seed in (0, 0, 1))
    passes = [order(first), order(first)]
    for expected in passes:
        torch.rand(3)  # somebody else draws
        assert torch.equal(order(second), expected)
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(order(other), passes[0])
    images = mnist(data_dir, train=True)[0].flatten(1)
    for options, count, held_out in (("--limit=7", 7, None), ("--validate=100", 150, 150), ("--validate=249", 1, 1)):
        data = load_data("--data-dir", data_dir, "--limit", 200, options)
        assert torch.equal(order(data.train_loader).sort(dim=0).values, images[:count].sort(dim=0).values)  # each once
        assert torch.equal(order(data.eval_loader), images[held_out:] if held_out else mnist(data_dir)[0].flatten(1))


def test_synthetic_digits_repeat_by_seed_and_do_not_leak():
    first, second, other = (load_data("--dataset", "synthetic", "--seed", seed) for seed in (0, 0, 1))
    for loader, count in ((first.train_loader, 60_000), (first.eval_loader, 10_000)):
        images, labels = loader.dataset.tensors
        assert (images.shape, images.min(), images.max()) == ((count, 1, 28, 28), 0, 1)
        assert labels.bincount(minlength=10).min() > 0.08 * count
    seen = {image.numpy().tobytes() for image, _ in first.train_loader.dataset}
    assert not any(image.numpy().tobytes() in seen for image, _ in first.eval_loader.dataset)
    for a, b, c in zip(*(data.eval_loader.dataset.tensors for data in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@each_device
def test_random_affine_moves_and_turns_as_far_as_asked(device):
    torch.manual_seed(0)
    middle, pixel = torch.zeros(100, 1, 28, 28, device=device), torch.arange(28, device=device) - 13.5
    middle[:, :, 12:16, 12:16] = 1  # its centre of mass is the middle of the picture
    moved = common.random_affine(middle, 0, 0, 4).squeeze(1)  # (100, 28, 28)
    across, down = ((moved.sum(dim=axis) * pixel).sum(dim=1) / 16 for axis in (1, 2))  # pixels off the middle, (100,)
    for distance in (across, down):
        assert -4.01 < distance.min() < -3
        assert 3 < distance.max() < 4.01
    assert (across - down).abs().max() > 4  # each in its own way
    areas = common.random_affine(middle, 0, 0.5, 0).sum(dim=(1, 2, 3)) / 16
    assert 0.2 < areas.min() < 0.4
    assert 1.9 < areas.max() < 2.3
    full = common.random_affine(torch.ones(100, 1, 28, 28, device=device), 0, 0, 4)
    assert full[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].min() == 0  # what comes in from outside
    images = torch.zeros(50, 1, 20, 60)  # not square: it turns without shearing
    images[:, :, 8:12, 15:45] = 1  # a bar of 30x4 pixels in the middle
    turned = common.random_affine(images, 30, 0, 0)
    assert (turned.sum(dim=(1, 2, 3)) - 120).abs().max() < 2  # a turn keeps the area
    y, x = torch.meshgrid(torch.arange(20) - 9.5, torch.arange(60) - 29.5, indexing="ij")
    squares = (turned * (x**2 + y**2)).sum(dim=(1, 2, 3))  # and each point's distance from the middle
    assert (squares / squares.mean() - 1).abs().max() < 0.02
    angles = (turned * x * y).sum(dim=(1, 2, 3)) / (turned * x**2).sum(dim=(1, 2, 3))
    assert angles.min() < -0.5 < 0.5 < angles.max()  # tan(30 degrees) = 0.58


def test_data_that_cannot_be_had(data_dir, fail, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    raw = data_dir / "MNIST/raw"
    for place, words in ((data_dir / "missing", "refused"), (data_dir / "MNIST", "refused"), ("x" * 300, "too long")):
        message, _ = fail(cnn_mnist, "--data-dir", place, says=f"{place}/MNIST/raw/train-images-idx3-ubyte: it is not")
        assert words in message
        assert "see --data-dir, or --dataset synthetic" in message
    for name in sorted(file.name for file in raw.iterdir()):
        (raw / name).rename(raw / "other")
        fail(rnn_mnist, "--data-dir", data_dir, says=f"cannot read {raw / name}: it is not there, and")
        (raw / "other").rename(raw / name)
    monkeypatch.setattr(os.path, "isfile", lambda path: False)  # as for a folder that may not be searched
    monkeypatch.setattr(datasets.MNIST, "download", Mock(side_effect=PermissionError(13, "Permission denied")))
    fail(rnn_mnist, "--data-dir", data_dir, says="it is not there, and cannot be fetched: [Errno 13] Permission denied")


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind", ["images-idx3-ubyte", "labels-idx1-ubyte"])
def test_other_and_damaged_data(split, kind, data_dir, fail):
    file = data_dir / f"MNIST/raw/{split}-{kind}"
    whole, before = file.read_bytes(), sorted(file.parent.iterdir())
    for content in (whole[:-1], b"", b"<!DOCTYPE html><html>", b"\x1f\x8b" + whole[2:]):
        file.write_bytes(content)
        message, _ = fail(rnn_mnist, "--data-dir", data_dir, says=f"cannot read {file}: it is no IDX file, or not all")
        assert "if it is still being fetched run again, else move it away" in message
    count, zeros = {"train": 250, "t10k": 130}[split], torch.zeros(300, 8, dtype=torch.uint8)
    images, labels = f"images ({count}, 28, 28)", f"labels ({count},) up to 9"
    others = {"(250, 8) up to 0": zeros[:250].int(), "(99,) up to 0": zeros[:99, 0]}
    others[f"({count},) up to 26"] = zeros[:count, 0] + 26
    others = {f"{images} and labels {held}": other for held, other in others.items()}
    if kind.startswith("images"):
        others = {f"images (250, 56, 28) and {labels}": zeros[:250, :1, None].expand(-1, 56, 28)}
        others[f"images (99, 28, 28) and {labels}"] = zeros[:99, :1, None].expand(-1, 28, 28)
    for held, tensor in others.items():
        write_idx(file, tensor)
        message, _ = fail(rnn_mnist, "--data-dir", data_dir, says=f"MNIST/raw holds {held}, not (N, 28, 28)")
        assert "'For another data set' in README.md" in message
    assert sorted(file.parent.iterdir()) == before  # nothing was deleted


# ---- loaders and evaluation ----


def test_evaluate_leaves_mode_and_random_state():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(), nn.Linear(784, 10))
    model[1].eval()  # frozen, as in fine-tuning
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8)), batch_size=4, shuffle=True)
    state, mean, modes = torch.get_rng_state(), model[1].running_mean.clone(), []
    model[2].register_forward_hook(lambda dropout, *_: modes.append((dropout.training, torch.is_grad_enabled())))
    common.evaluate(model, loader)
    assert modes == [(False, False)] * 2  # a pair per batch
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, mean)
    with pytest.raises(RuntimeError):
        common.evaluate(model, [(torch.rand(2, 5), torch.zeros(2))])  # which does not fit
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


@each_device
def test_evaluate_with_labels_of_few_bits(device):
    labels = torch.arange(17, dtype=torch.uint8)
    model = nn.Linear(17, 17, bias=False).to(device)
    nn.init.eye_(model.weight)
    evaluation = common.evaluate(model, [(nn.functional.one_hot(labels.long()).float(), labels)])
    assert evaluation.accuracy == 1
    assert torch.equal(evaluation.confusion, torch.eye(17, dtype=torch.int64))
    assert evaluation.loss == pytest.approx(math.log(math.e + 16) - 1)


# ---- report ----


@each_script
@pytest.mark.parametrize("split", ["test", "validation"])
def test_each_epoch_reports_its_own_figures_until_an_interrupt(script, split, data_dir, fail, monkeypatch):
    file, log, figures = data_dir / "weights.pt", data_dir / "log.csv", [(0.5, 0.9), (0.7, 0.8), (0.6, 0.85)]
    log.write_text("of a former run")
    evaluations = [SimpleNamespace(loss=loss, accuracy=accuracy) for loss, accuracy in figures]
    monkeypatch.setattr(common, "evaluate", Mock(side_effect=[*evaluations, KeyboardInterrupt]))
    options = ["--data-dir", data_dir, "--save", file, "--log", log]
    if split == "validation":
        options += ["--validate", 50]
    _, output = fail(script, *options, says="Interrupted.\n", status=130)
    assert file.is_file()
    lines = re.findall(rf"{split} loss: (\S+), {split} accuracy: (\S+)%, Time: (\S+) s", output, re.IGNORECASE)
    assert [line[:2] for line in lines] == [("0.5000", "90.00"), ("0.7000", "80.00"), ("0.6000", "85.00")]
    head, *rows = log.read_text().splitlines()
    assert head == f"epoch,train_loss,{split}_loss,{split}_accuracy,seconds"
    rows = [[float(word) for word in row.split(",")] for row in rows]
    assert [(row[0], *row[2:]) for row in rows] == [(i + 1, *figures[i], float(lines[i][2])) for i in range(3)]


@each_script
def test_loss_that_is_not_finite(script, data_dir, train, fail, monkeypatch):
    file = data_dir / "weights.pt"
    train(script, "--epochs", 1, "--save", file)
    good = file.read_bytes()
    options = ["--data-dir", data_dir, "--load", file, "--save", file, "--log", data_dir / "log.csv"]
    says = "the loss is no longer finite after epoch 1; try a smaller --lr"
    _, output = fail(script, *options, "--lr", 1e37, says=says)
    assert "accuracy" not in output
    for loss in (math.nan, math.inf):
        monkeypatch.setattr(common, "evaluate", lambda *_, loss=loss: SimpleNamespace(loss=loss, accuracy=0.1))
        fail(script, *options, says=says)
    assert file.read_bytes() == good
    assert not (data_dir / "log.csv").exists()


class Brightness(nn.Module):
    """Logits that say class 0, the surer the brighter the image."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.stack([images.mean(dim=(1, 2, 3)), self.zero.expand(len(images))], dim=1)


@each_device
def test_errors_most_confident_first(device, tmp_path, capsys):
    torch.manual_seed(0)
    images = torch.rand(130, 1, 28, 28, device=device) * torch.linspace(0.1, 1, 130, device=device).view(-1, 1, 1, 1)
    images, labels = (images * 255).round() / 255, torch.ones(130, dtype=torch.int64, device=device)
    labels[-1] = 0  # the brightest is right
    file, loader, model = tmp_path / "errors.png", common.Loader(images, labels, 50), Brightness().to(device)
    common.draw_errors(file, common.evaluate(model, loader), loader, ["zero", "one"])
    assert capsys.readouterr().out == f"{file} shows 100 of 129 mistakes.\n"
    cells = pil_to_tensor(Image.open(file)).unfold(1, 140, 140).unfold(2, 120, 120)  # (3, 10, 10, 140, 120)
    for place, image in ((0, images[128]), (1, images[127]), (99, images[29])):
        cell = cells[:, place // 10, place % 10]
        assert torch.equal(cell[:, 4:88:3, 18:102:3], (image * 255).round().to(torch.uint8).cpu().expand(3, -1, -1))
        assert (cell[0, 90:] < 128).sum() > 100  # there is text below
    right = [(images[-1:], labels[-1:])]
    common.draw_errors(file, common.evaluate(model, right), right, ["zero", "one"])
    assert capsys.readouterr().out == f"{file} shows 0 of 0 mistakes.\n"
    assert pil_to_tensor(Image.open(file)).min() == 255


def test_errors_in_colour_normalized_not_square_with_long_names(tmp_path):
    images, names = torch.zeros(2, 3, 14, 28), ["zero", "a class with a name of 37 letters 1990"]
    images[:, 0], images[:, 1, 7:] = 1, 0.5  # red above, orange below
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    for batch in (((images - 0.5) / 0.25, zero), (images, one)):  # the former from -2 to 2
        common.draw_errors(tmp_path / "errors.png", common.evaluate(Brightness(), [batch]), [batch], names)
        sheet = pil_to_tensor(Image.open(tmp_path / "errors.png"))
        assert sheet.shape[2] > 10 * 220  # the whole name
        assert [sheet[:, y, 62].tolist() for y in (10, 32, 62)] == [[255, 0, 0], [255, 127, 0], [255] * 3]


@each_script
@pytest.mark.parametrize(("option", "folder"), [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_class_names(script, option, folder, data_dir, train):
    (data_dir / "MNIST").rename(data_dir / folder)
    file, names = data_dir / "weights.pt", getattr(datasets, folder).classes
    _, output = train(script, "--dataset", option, "--epochs", 1, "--save", file)
    header, *lines = output.splitlines()
    assert f"Data: {option} (" in header
    assert [line.rsplit(maxsplit=4)[0] for line in lines[-22:-12]] == names
    assert max(map(len, lines)) <= 80
    draw_page(7).save(data_dir / "7.png")
    _, answer = train(script, "--dataset", option, "--load", file, "--predict", data_dir / "7.png")
    assert re.fullmatch(r".*7\.png: (.*) \(.*%\)\n", answer)[1] in names


@each_script
@pytest.mark.parametrize("shape", [(3, 32, 32), (12, 5)], ids=["colour images", "sequences"])
def test_nothing_untrue_is_said_of_data_of_one_s_own(script, shape, tmp_path, train, monkeypatch):
    def report(classes, outputs):
        def split(count):
            return DataLoader(TensorDataset(torch.randn(count, *shape), torch.arange(count) % 3), batch_size=8)

        layers = nn.BatchNorm1d(math.prod(shape)), nn.Dropout(), nn.Linear(math.prod(shape), outputs)
        monkeypatch.setattr(common, "load_data", lambda args: common.Data(split(60), split(30), classes))
        model = nn.Sequential(nn.Flatten(), *layers)
        return train(script, "--epochs", 1, "--errors", tmp_path / "errors.png", model=model)[1].splitlines()

    names = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"]
    header, *lines = report(names, 3)
    assert header.endswith("Data: data of your own (60 training and 30 test samples)")
    assert "mnist" not in "".join(lines).replace(str(tmp_path), "")
    lines = lines[-10:-1]
    assert [(line[:-40].strip(), line.split()[-1]) for line in lines[1:4]] == [(name, "10") for name in names]
    assert lines[5].split() == names  # whole
    assert len({len(line) for line in lines[:4]}) == len({len(line) for line in lines[5:8]}) == 1  # aligned
    assert max(map(len, lines)) <= 80
    numbers = torch.tensor([3, 5, 7]).numpy()
    assert [line.split()[0] for line in report(numbers, 3)[-9:-6]] == ["3", "5", "7"]
    lines = report(["a", "b", "c"], 5)[-14:-1]  # more outputs than names
    assert [line.split()[0] for line in lines[1:6]] == lines[7].split()[-5:] == ["a", "b", "c", "3", "4"]
    assert report(list("abcdefgh"), 3)[-5].split() == ["a", "b", "c"]  # fewer


# ---- saved weights ----


@each_script
@each_device
def test_save_and_load(script, device, train, tmp_path):
    file = tmp_path / "weights.pt"
    model, output = train(script, "--device", device, "--epochs", 2, "--save", file)
    loaded, evaluated = train(script, "--device", device, "--epochs", 0, "--load", file)
    assert same_weights(model, loaded)
    assert printed(evaluated, "accuracy") == printed(output, "accuracy")[-1:]
    assert "finished" not in evaluated
    assert not same_weights(model, train(script, "--device", device, "--epochs", 1, "--load", file)[0])
    plain = cnn_mnist.CNN() if script is cnn_mnist else rnn_mnist.RNN()
    plain.load_state_dict(torch.load(file))  # as everybody does
    assert same_weights(plain, model.to("cpu"))
    assert {tensor.device.type for tensor in torch.load(file).values()} == {"cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")  # as if they lay there
        torch.save(model.state_dict(), file)
    assert same_weights(train(script, "--epochs", 0, "--load", file)[0], model)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_save_replaces_the_file_or_leaves_it(error, tmp_path, train, monkeypatch):
    file, link = tmp_path / "weights.pt", tmp_path / "link"
    train(cnn_mnist, "--epochs", 1, "--save", file)
    link.hardlink_to(file)
    former, save = file.read_bytes(), torch.save
    train(cnn_mnist, "--epochs", 2, "--save", file)
    latter = file.read_bytes()
    assert latter != link.read_bytes() == former  # replaced, not written over

    def fail_half_way(weights, stream):
        stream.write(former[: len(former) // 2])
        raise error

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises((common.UserError, KeyboardInterrupt)) as raised:
        train(cnn_mnist, "--epochs", 1, "--save", file)
    assert str(raised.value) in ("", f"cannot write {file}: [Errno 28] disk full; name another place")
    assert file.read_bytes() == latter
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "link", "MNIST"}
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=error))
    with pytest.raises((common.UserError, KeyboardInterrupt)):
        train(cnn_mnist, "--epochs", 1, "--save", file, "--log", tmp_path / "log.csv")
    assert file.read_bytes() != latter  # the weights came before the log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_full_disk(tmp_path, data_dir, fail):
    (tmp_path / "weights.pt.part").symlink_to("/dev/full")
    says = f"cannot write {tmp_path / 'weights.pt'}: [Errno 28] No space left on device; name another place\n"
    fail(rnn_mnist, "--data-dir", data_dir, "--epochs", 1, "--save", tmp_path / "weights.pt", says=says)


@each_script
def test_load_refuses_another_file(script, tmp_path, train, fail, monkeypatch):
    file, trace = tmp_path / "weights.pt", tmp_path / "trace"
    fail(script, "--load", tmp_path / "missing", says=f"cannot load {tmp_path / 'missing'}: [Errno 2] No such file")
    fail(script, "--load", tmp_path, says=f"cannot load {tmp_path}: [Errno 21] Is a directory")
    model, _ = train(script, "--epochs", 1, "--save", file)
    saved, whole = torch.load(file), file.read_bytes()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which would be torch's default then
    harmful = type("Harmful", (), {"__reduce__": lambda self: (os.mkdir, (str(trace),))})()  # unpickled, makes a folder
    fewer = {name: saved[name] for name in list(saved)[1:]}
    contents = [whole[:-1000], b"seven is a digit", b"", pickle.dumps(harmful), {"weights": harmful}, [], fewer]
    contents += [{"weights": saved}, {**saved, "fc.bias": torch.zeros(11)}, {**saved, "fc2.bias": torch.zeros(1)}]
    contents += [(rnn_mnist.RNN() if script is cnn_mnist else cnn_mnist.CNN()).state_dict()]
    for content in contents:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        message, _ = fail(script, "--epochs", 0, "--load", file, says=f"cannot load {file}: ")
        assert f"take a file that --save wrote for this {type(model).__name__}" in message
        assert not trace.exists()


def test_sizes_of_the_lstm(tmp_path, train, fail):
    file, sizes = tmp_path / "small.pt", ["--hidden", 16, "--layers", 3]
    saved, _ = train(rnn_mnist, "--epochs", 1, *sizes, "--save", file)
    loaded, output = train(rnn_mnist, "--epochs", 0, *sizes, "--load", file)
    assert same_weights(saved, loaded)
    assert "RNN (7,466 parameters)" in output  # 4*16 * (28+16 + 2) + 2 * 4*16 * (16+16 + 2) + 170
    for options in ([], sizes[:2], sizes[2:]):
        message, _ = fail(rnn_mnist, *options, "--load", file, says=f"cannot load {file}: Error(s) in loading")
        assert "with the same --hidden and --layers" in message


# ---- pictures of your own ----


def draw_page(digit, size=200, page=(500, 400), at=(250, 120), ink=0, paper=255):
    """A picture of one digit, dark on light, off the middle."""
    picture = Image.new("L", page, paper)
    ImageDraw.Draw(picture).text(at, str(digit), fill=ink, font=ImageFont.load_default(size=size))
    return picture


def with_wide_pixels(picture, mode, dtype, factor):
    values = (pil_to_tensor(picture).double() * factor).numpy().astype(dtype)
    return Image.frombytes(mode, picture.size, values.tobytes())


LIGHT = to_pil_image((torch.linspace(255, 102, 500).expand(1, 400, -1)).to(torch.uint8))
GRAIN = Image.effect_noise((1000, 800), 60)
FORMS = {
    "in a corner": lambda digit: draw_page(digit, at=(2, -40)),
    "large and grainy": lambda digit: Image.blend(draw_page(digit, 400, (1000, 800), (500, 240)), GRAIN, 0.5),
    "light on dark": lambda digit: ImageOps.invert(draw_page(digit)),
    "pencil": lambda digit: draw_page(digit, ink=140, paper=200),
    "lit from the left": lambda digit: ImageChops.multiply(draw_page(digit), LIGHT),
    "dark on glass": lambda digit: Image.merge("LA", (draw_page(digit, paper=0), ImageOps.invert(draw_page(digit)))),
    "light on glass": lambda digit: Image.merge("LA", (draw_page(digit, ink=255), ImageOps.invert(draw_page(digit)))),
    "with a clear frame": lambda digit: ImageOps.expand(draw_page(digit).convert("RGBA"), 20, (0, 0, 0, 0)),
    "turned by EXIF": lambda digit: draw_page(digit).transpose(Image.Transpose.ROTATE_90),
    "32 bits": lambda digit: with_wide_pixels(draw_page(digit, ink=100, paper=220), "I", "<i4", 65_537),
    "16 bits, big-endian": lambda digit: with_wide_pixels(draw_page(digit), "I;16B", ">u2", 257),
    "float": lambda digit: with_wide_pixels(draw_page(digit), "F", "<f4", 1 / 3),
    "colour": lambda digit: ImageOps.colorize(draw_page(digit), "darkred", "lightyellow"),
}


@pytest.mark.parametrize("form", FORMS)
def test_picture_of_any_form(form, tmp_path):
    for digit in (2, 4, 7):
        draw_page(digit).save(tmp_path / "plain.png")
        picture = FORMS[form](digit)
        name = "other.tiff" if picture.mode[0] in "IF" else "other.png"
        exif = picture.getexif()
        exif[0x0112] = 6 if "EXIF" in form else 1  # orientation: to be shown turned a quarter clockwise, or as it is
        picture.save(tmp_path / name, exif=exif)
        plain, other = common.read_picture(tmp_path / "plain.png"), common.read_picture(tmp_path / name)
        assert (plain.shape, other.shape, plain.min(), plain.max()) == ((1, 28, 28), (1, 28, 28), 0, 1)
        # Rounding may put the centre of mass one pixel further.
        shifted = [other.roll((y, x), dims=(1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        assert min((plain - image).abs().sum() for image in shifted) < 0.15 * plain.sum()


def test_picture_is_upright_and_its_centre_of_mass_where_mnist_has_it():
    for digit in range(10):
        page = ImageOps.invert(draw_page(digit))
        image = common.mnist_form(common.grey_levels(page))[0]
        for dim in (0, 1):
            assert image.sum(dim=dim) @ torch.arange(28.0) / image.sum() == pytest.approx(14, abs=0.51)
        rows, columns = (image.any(dim=dim).nonzero() for dim in (1, 0))
        found = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert max(found.shape) == 20
        expected = page.crop(page.getbbox()).resize(found.T.shape, Image.Resampling.BILINEAR)
        expected = pil_to_tensor(expected)[0] / 255
        assert (found - expected).abs().mean() < 0.1
        if digit in (2, 4, 5, 7):  # those that look otherwise in a mirror
            assert all((found.flip(dim) - expected).abs().mean() > 0.2 for dim in (0, 1))
