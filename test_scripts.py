"""Tests of the scripts, on the CPU and on the machine's accelerator where it has one: python -m pytest

They need no network. Those that need the real MNIST use ./data, and are skipped where it is not there.
"""

import inspect
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
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

torch.set_num_threads(1)  # on a machine busy with other things, two would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the tests start


@pytest.fixture(params=[cnn_mnist, rnn_mnist], ids=["cnn_mnist", "rnn_mnist"])
def script(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def write_idx(path, values):
    """Write a tensor as an IDX file: 0, 0, type, dimensions, each size in 4 bytes big-endian, the values so too."""
    kind, dtype = (8, "u1") if values.dtype == torch.uint8 else (12, ">i4")
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, kind, values.dim()]) + sizes + values.numpy().astype(dtype).tobytes())


@pytest.fixture
def data_dir(tmp_path):
    """A folder with a small MNIST of drawn digits: 250 training and 130 test images."""
    raw, generator = tmp_path / "MNIST/raw", torch.Generator().manual_seed(1)
    raw.mkdir(parents=True)
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
def fail(monkeypatch, capsys, data_dir):
    """A function that runs a command line in this process, which has to end so; it returns the message and stdout."""

    def fail(script, *options, says, status=1):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--data-dir", str(data_dir), *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            common.run(script.main)
        output, message = capsys.readouterr()
        if isinstance(exit.value.code, str):  # which Python prints, and ends with status 1
            message, exit.value.code = exit.value.code, 1
        assert exit.value.code == status
        assert says in message
        assert status == 2 or "\n" not in message.strip()
        assert "delete" not in message
        return message, output

    return fail


def start(script, *options, **variables):
    """Start a script as a process of its own, its output buffered as Python does by default, and heeding Ctrl-C."""
    command = [sys.executable, HERE / f"{script.__name__}.py", *map(str, options)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables
    heed = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=env, preexec_fn=heed, **pipes)


def load_data(*options):
    return common.load_data(common.parse_args(common.make_parser(""), ["--device", "cpu", *options]))


def mnist(data_dir, train=False):
    """The images (N, 1, 28, 28) and labels (N,) of a split, as torchvision gives them one by one."""
    images, labels = zip(*datasets.MNIST(data_dir, train=train, transform=transforms.ToTensor()), strict=True)
    return torch.stack(images), torch.tensor(labels)


def printed(output, word):
    return [float(figure) for figure in re.findall(rf"{word}: (\d\S*\d)", output)]


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def record(monkeypatch, owner, name, what):
    """Return a list to which each call of owner.name adds what(*its arguments), and then goes on as before."""
    seen, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (seen.append(what(*a, **k)), original(*a, **k))[1])
    return seen


def test_smoke_one_batch(script, device, train):
    before, _ = train(script, "--device", device, "--epochs", 0)
    after, output = train(script, "--device", device, "--epochs", 1, "--limit", 100)
    assert [math.isfinite(loss) for loss in printed(output, " Loss")] == [True]
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert new.device.type == device
        assert not torch.equal(old, new)


@pytest.mark.parametrize("option", ["--epochs=2", "--one-cycle", "--augment", "--amp"])
def test_same_seed_same_weights(script, device, option, train):
    options = ["--device", device, "--epochs", 2, "--limit", 100, "--batch-size", 32]
    model, _ = train(script, *options, option)
    assert same_weights(model, train(script, *options, option)[0])
    assert not same_weights(model, train(script, *options, option, "--seed", 1)[0])
    assert same_weights(model, train(script, *options)[0]) == (option == "--epochs=2")
    assert not same_weights(*(train(script, "--epochs", 0, "--seed", seed)[0] for seed in (0, 1)))
    assert torch.backends.cudnn.deterministic and os.getenv("CUBLAS_WORKSPACE_CONFIG")  # or a GPU may not repeat it


@pytest.mark.parametrize("options", [[], ["--one-cycle", "--augment"]], ids=str)
def test_a_step_neither_waits_for_the_device_nor_converts(script, device, options, train):
    def count(batch_size):
        with torch.profiler.profile() as profile:
            train(script, "--device", device, "--epochs", 1, "--batch-size", batch_size, *options)
        called = [event.name for event in profile.events() if event.cpu_parent is None]  # by the scripts, not in torch
        return [called.count(name) for name in ("aten::item", "aten::is_nonzero", "aten::to")]

    assert count(250) == count(25)  # 1 and 10 steps, of which the last is printed


def test_defaults_train_as_the_tutorial_does(script, data_dir, train, monkeypatch):
    fused = record(monkeypatch, torch.optim.Adam, "step", lambda self, *_: self.param_groups[0]["fused"])
    trained, output = train(script, "--epochs", 2, "--log", data_dir / "log.csv")
    assert fused == [True] * 6
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
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(("options", "peak"), [([], 0.01), (["--lr", 0.002], 0.002)], ids=str)
def test_one_cycle_augment_and_amp_as_the_readme_says(script, device, options, peak, train, monkeypatch):
    rates = record(monkeypatch, torch.optim.Adam, "step", lambda self, *_: self.param_groups[0]["lr"])
    maps = record(monkeypatch, nn.functional, "affine_grid", lambda theta, *_, **__: theta.cpu())
    dtypes = record(monkeypatch, nn.CrossEntropyLoss, "forward", lambda self, logits, _: logits.dtype)
    options = ["--device", device, "--one-cycle", "--augment", "--amp", "--batch-size", 100, *options]
    model, _ = train(script, "--epochs", 10, *options)
    assert [rates[0], rates[8], rates[-1]] == pytest.approx([peak / 25, peak, peak / 250_000])  # 30% of 30 steps
    assert rates == sorted(rates[:8]) + sorted(rates[8:], reverse=True)
    assert dtypes == [torch.bfloat16] * 30
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    theta = torch.cat(maps)
    assert len(theta) == 10 * 250  # each training image in each epoch, and no test image
    turn, shift = theta.split([2, 1], dim=2)  # (2500, 2, 2), a rotation divided by the size, and (2500, 2, 1)
    assert 9.8 < torch.atan2(turn[:, 1, 0], turn[:, 0, 0]).rad2deg().abs().max() < 10.01
    size, pixels = turn.det().rsqrt(), {cnn_mnist: 1, rnn_mnist: 2}[script]
    assert (size.min().item(), size.max().item()) == pytest.approx((0.9, 1.1), abs=0.002)
    assert (shift.abs().amax(dim=0) * 14).flatten().tolist() == pytest.approx([pixels] * 2, abs=0.02 * pixels)
    train(script, "--epochs", 0, *options)


def test_synthetic_digits_are_learned(capsys):
    # With a rate that falls to 0, the last steps depend little on how a machine rounds.
    rnn_mnist.main(["--dataset", "synthetic", "--limit", 30000, "--epochs", 1, "--batch-size", 50, "--one-cycle"])
    assert printed(capsys.readouterr().out, "accuracy")[0] >= 98


@pytest.mark.skipif(not (HERE / "data/MNIST/raw/train-images-idx3-ubyte").is_file(), reason="MNIST is not in ./data")
def test_real_mnist_is_learned(capsys):
    cnn_mnist.main(["--data-dir", HERE / "data", "--epochs", 1])
    assert 96 <= printed(capsys.readouterr().out, "accuracy")[0] < 99


def test_a_network_handed_in_is_the_one_that_is_trained(script, device, train, monkeypatch):
    mine = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))
    before = mine[2].weight.clone()
    model, output = train(script, "--device", device, "--epochs", 1, model=mine)
    assert model is mine
    assert "Model: Sequential (9,418 parameters)" in output  # 2*784 + 784*10 + 10
    learned = mine[2].weight.clone()
    assert not torch.equal(learned.cpu(), before)
    monkeypatch.setattr(common, "end_epoch", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(script, "--device", device, model=mine)
    assert not torch.equal(mine[2].weight, learned)  # after an interrupt it is what it then was


def test_bug_softmax_before_cross_entropy_loss(script, train):
    # With softmax twice the loss of ten classes stays above ln(e + 9) - 1 = 1.46, also on a batch learned by heart.
    _, output = train(script, "--limit", 10, "--epochs", 120, "--lr", 0.003)
    assert printed(output, " Loss")[-1] < 0.5


def test_bug_classifier_input_size(train):
    model, images = train(cnn_mnist, "--epochs", 0)[0], torch.rand(3, 1, 28, 28)
    layers = model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), model.fc
    assert torch.equal(model(images), nn.Sequential(*layers)(images))  # as in the tutorial
    assert [model.conv1.weight.shape, model.conv2.weight.shape] == [(16, 1, 3, 3), (32, 16, 3, 3)]
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("model_class", [cnn_mnist.CNN, rnn_mnist.RNN])
def test_bug_batch_taken_for_time(model_class, device):
    model, images = model_class().to(device), torch.rand(5, 1, 28, 28, device=device)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-3)  # a GPU may round to TF32


def test_bug_last_batch_row_taken_for_last_time_step():
    model, images = rnn_mnist.RNN(), torch.rand(3, 1, 28, 28)
    _, (hidden, _) = model.lstm(images.squeeze(1))  # (2, 3, 128): each layer's, after the last of the rows from the top
    assert torch.allclose(model(images), model.fc(hidden[-1]), atol=1e-6)


def test_bug_undefined_names(script, data_dir):
    process = start(script, "--data-dir", data_dir, "--epochs", 2, "--device", "cpu")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    model = "CNN (20,490" if script is cnn_mnist else "RNN (214,282"
    lines = f"Device: cpu, Model: {model} parameters), Data: mnist (250 training and 130 test samples)\n"
    for epoch in ("1", "2"):
        lines += f"Epoch [{epoch}/2], Step [3/3], Loss: 0.0000\n"
        lines += f"Epoch [{epoch}/2], Test loss: 0.0000, Test accuracy: 00.00%, Time: 0.00 s\n"
    figures = re.escape(f"{lines}Training finished.\nClass ").replace("00", r"\d+").replace(r"0\.", r"\d\.")
    assert re.match(figures, output)


@pytest.mark.parametrize("options", [
    "--epochs 2", "--epochs 2 --augment", "--epochs 0", "--epochs 1 --validate 120", "--epochs 2 --dataset kmnist",
])  # fmt: skip
def test_bug_test_set_never_evaluated(script, options, data_dir, capsys, monkeypatch):
    """Every figure of the report and of the mistakes, worked out anew, one image at a time, in double precision."""
    texts = record(monkeypatch, ImageDraw.ImageDraw, "multiline_text", lambda self, at, text, *_, **__: text)
    file, split = data_dir / "errors.PNG", "Validation" if "validate" in options else "Test"
    images, labels = (part[-120:] for part in mnist(data_dir, train=True)) if split != "Test" else mnist(data_dir)
    names = datasets.KMNIST.classes if "kmnist" in options else list("0123456789")
    (data_dir / "MNIST").rename(data_dir / ("KMNIST" if "kmnist" in options else "MNIST"))
    options = [*options.split(), "--data-dir", data_dir, "--device", "cpu", "--batch-size", 10, "--lr", 0.003]
    model, evaluation = script.main([*options, "--errors", file])
    lines = capsys.readouterr().out.splitlines()
    logits = torch.cat([model.eval()(image.unsqueeze(0)).detach().double() for image in images])
    shares, labels, predicted = logits.softmax(dim=1), labels.tolist(), logits.argmax(dim=1).tolist()
    confusion, count = [[0] * 10 for _ in range(10)], len(labels)
    for label, said in zip(labels, predicted, strict=True):
        confusion[label][said] += 1
    wrong = [n for n in range(count) if labels[n] != predicted[n]]
    loss, accuracy = re.findall(rf"{split} loss: (\S+), {split} accuracy: (\S+)%", "\n".join(lines))[-1]
    expected = -sum(math.log(shares[n, labels[n]]) for n in range(count)) / count
    assert (float(loss), evaluation.loss) == pytest.approx((expected, expected), abs=1e-4)
    assert float(accuracy) == pytest.approx(100 - 100 * len(wrong) / count, abs=0.006)
    assert evaluation.accuracy == (count - len(wrong)) / count
    assert type(evaluation.loss) is type(evaluation.accuracy) is float
    assert (evaluation.confusion.tolist(), evaluation.labels.tolist()) == (confusion, labels)
    assert torch.allclose(evaluation.logits.double(), logits, atol=1e-4)
    training = {"0": "", "1": "130 training and ", "2": "250 training and "}[options[1]]
    assert lines[0].endswith(f"({training}{count} {split.lower()} samples)")
    assert ("Training finished." in lines) == (options[1] != "0")
    assert lines[-24].split() == ["Class", "Precision", "Recall", "F1", "Count"]
    for i, (name, *figures) in enumerate(line.split() for line in lines[-23:-13]):
        hits, true, said = confusion[i][i], sum(confusion[i]), sum(row[i] for row in confusion)
        expected = [hits / max(said, 1), hits / max(true, 1), 2 * hits / max(said + true, 1), true]
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=1e-4)
        assert [name, *lines[i - 11].split()] == [names[i], names[i], *map(str, confusion[i])]
    assert lines[-12].split() == names
    assert max(map(len, lines[-12:-1])) <= 80
    assert lines[-1] == f"{file} shows {min(len(wrong), 100)} of {len(wrong)} mistakes."
    shown = [re.fullmatch(r"true: (\w+)\nsaid: (\w+)\n(.*)% sure", text).groups() for text in texts]
    wrong = sorted(wrong, key=lambda n: -shares[n].max())[:100]
    assert [float(sure) for *_, sure in shown] == pytest.approx([100 * shares[n].max().item() for n in wrong], abs=0.06)
    said = sorted(pair for *pair, _ in shown)  # sorted, as two may be equally sure
    assert said == sorted([names[labels[n]], names[predicted[n]]] for n in wrong)


def test_bug_steps_counted_without_the_last_batch(train):
    for batch_size, steps in ((100, ["3/3"]), (2, ["100/125", "125/125"]), (1000, ["1/1"]), (125, ["2/2"])):
        _, output = train(cnn_mnist, "--epochs", 1, "--batch-size", batch_size)
        assert re.findall(r"Step \[(.*)\]", output) == steps


def test_the_file_to_hand_in(data_dir, train, monkeypatch, capsys):
    program = re.search(r"```python\n(import math\n.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    room = re.search(r"# ---- loaders and evaluation.*(?=# ---- report ----)", inspect.getsource(common), re.DOTALL)[0]
    content = inspect.getsource(cnn_mnist.CNN) + room
    program = re.sub("# Here the class CNN, and from common.py what stands between .*", lambda _: content, program)
    (data_dir / "data").mkdir()
    (data_dir / "MNIST").rename(data_dir / "data/MNIST")
    monkeypatch.chdir(data_dir)
    exec(program, {})
    handed_in, (_, output) = capsys.readouterr().out, train(cnn_mnist, "--data-dir", "data")
    assert printed(handed_in, "Test loss") == pytest.approx(printed(output, "Test loss"), abs=0.01)
    tables = [[line.split()[::4] for line in text.splitlines()[-22:-12]] for text in (handed_in, output)]
    assert tables[0] == tables[1]  # class and count


@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_in_a_notebook_and_an_ide(script, launcher, data_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=len, flush=bool))
    monkeypatch.setattr(sys, "argv", [f"/usr/lib/{launcher}", "-f", "/tmp/kernel.json"])
    monkeypatch.setattr(common, "load_data", Mock(side_effect=[common.UserError("no data"), KeyboardInterrupt]))
    with pytest.raises(common.UserError) as raised:
        common.run(script.main)
    assert raised.value._render_traceback_() == ["error: no data"]  # IPython shows that in place of a traceback
    args = common.load_data.call_args.args[0]
    assert (args.epochs, args.batch_size, args.seed, args.dataset, args.data_dir) == (10, 100, 0, "mnist", "data")
    with pytest.raises(KeyboardInterrupt):
        script.main(["--epochs", 3])
    assert common.load_data.call_args.args[0].epochs == 3
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)  # a mistake in the program keeps its traceback, anywhere


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes as POSIX has them")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ctrl_c_and_a_closed_pipe(script, unbuffered, data_dir):
    # All that it would print is less than Python's buffer holds: the lines come at once, or not before its end.
    for status, message in ((130, "Interrupted.\n"), (1, "")):
        options = ["--data-dir", data_dir, "--batch-size", 1, "--epochs", 30]
        with start(script, *options, PYTHONUNBUFFERED=unbuffered) as process:
            assert process.stdout.readline().startswith("Device")
            assert "Step [100/250]" in process.stdout.readline()
            process.send_signal(signal.SIGINT) if message else process.stdout.close()
            assert process.stderr.read() == message
        assert process.returncode == status


@pytest.mark.parametrize("options", [
    *(f"{name} {value}" for name in ("--epochs", "--seed", "--lr") for value in ("x", "''")), "--dataset emnist",
    *(f"{name} {value}" for value in "0y" for name in ("--batch-size", "--limit", "--validate", "--hidden")),
    "--predict 7.png", "--errors mistakes.jpg", "--device gpu", "--device meta",
])  # fmt: skip
def test_wrong_command_line(options, fail):
    fail(rnn_mnist, *options.split(), says=f"error: argument {options.split()[0]}: ", status=2)


def test_device(fail, monkeypatch):
    gpu = Mock(**{"current_accelerator.return_value": torch.device("xpu")})
    monkeypatch.setattr(torch, "accelerator", gpu)
    monkeypatch.setattr(torch, "ones", Mock(return_value=torch.tensor(1.0)))
    assert [common.find_device(name) for name in ("auto", "cuda:1")] == [torch.device("xpu"), torch.device("cuda:1")]
    torch.ones.side_effect = RuntimeError("no kernel image\nis available. Compile with ...")
    fail(cnn_mnist, says="--device: xpu cannot be used: no kernel image is available; try --device cpu\n", status=2)
    gpu.is_available.return_value, torch.ones.side_effect = False, None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    fail(cnn_mnist, "--amp", says="argument --amp: a CPU without AVX-512 is many times slower", status=2)


def test_order_and_limits_of_the_images(data_dir):
    def order(loader):  # (N, 28*28)
        return torch.cat([images.flatten(1) for images, _ in loader])

    first, second, other = (load_data("--data-dir", data_dir, "--seed", seed).train_loader for seed in (0, 0, 1))
    one, another = order(first), order(first)
    torch.rand(3)  # somebody else draws
    assert all(torch.equal(order(second), same) for same in (one, another))
    assert not any(torch.equal(one, differs) for differs in (another, order(other)))
    images = mnist(data_dir, train=True)[0].flatten(1)
    for options, count, held_out in (("--limit=7", 7, None), ("--validate=100", 150, 150), ("--validate=249", 1, 1)):
        data = load_data("--data-dir", data_dir, "--limit", 200, options)
        assert data.train_loader.dataset.tensors[1].dtype == torch.int64
        assert torch.equal(order(data.train_loader).sort(dim=0).values, images[:count].sort(dim=0).values)  # each once
        assert torch.equal(order(data.eval_loader), images[held_out:] if held_out else mnist(data_dir)[0].flatten(1))


def test_synthetic_digits_repeat_by_seed_and_do_not_leak():
    first, second, other = (load_data("--dataset", "synthetic", "--seed", seed) for seed in (0, 0, 1))
    (images, labels), (test_images, _) = first.train_loader.dataset.tensors, first.eval_loader.dataset.tensors
    assert (images.shape, images.min(), images.max()) == ((60_000, 1, 28, 28), 0, 1)
    assert labels.bincount(minlength=10).min() > 0.08 * 60_000
    assert len(torch.cat([images, test_images]).flatten(1).unique(dim=0)) == 70_000
    assert torch.equal(test_images, second.eval_loader.dataset.tensors[0])
    assert not torch.equal(test_images, other.eval_loader.dataset.tensors[0])


def test_random_affine_turns_what_is_not_square_without_shearing(device, monkeypatch):
    maps = record(monkeypatch, nn.functional, "affine_grid", lambda theta, *_, **__: theta.cpu())
    turned = common.random_affine(torch.ones(50, 1, 20, 60, device=device), 30, 0, 0)
    assert turned.amin(dim=(1, 2, 3)).median() == 0  # what comes in from outside
    across, down = maps[0][:, 0, 1] * 60 / 20, maps[0][:, 1, 0] * 20 / 60  # now in pixels, no longer in images
    assert torch.allclose(across, -down)
    assert across.min() < -0.4 < 0.4 < across.max()  # sin(30 degrees) = 0.5


def test_data_that_cannot_be_had(data_dir, fail, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    (data_dir / "file").touch()  # which can be searched as little as a folder of somebody else's
    for place, words in (("missing", "refused"), ("MNIST", "refused"), ("x" * 300, "too long"), ("file", "Not a dir")):
        message, _ = fail(cnn_mnist, "--data-dir", data_dir / place, says=words)
        assert f"cannot read {data_dir / place}/MNIST/raw/train-images-idx3-ubyte: it is not there" in message


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind", ["images-idx3-ubyte", "labels-idx1-ubyte"])
def test_other_and_damaged_data(split, kind, data_dir, fail, monkeypatch):
    file = data_dir / f"MNIST/raw/{split}-{kind}"
    whole, before = file.read_bytes(), sorted(file.parent.iterdir())
    for content in (whole[:-1], b"", b"<!DOCTYPE html><html>", b"\x1f\x8b" + whole[2:]):
        file.write_bytes(content)
        message, _ = fail(rnn_mnist, says=f"cannot read {file}: it is unreadable, or no whole IDX file")
        assert "if it is being fetched run again, else move it away" in message
    count, zeros = {"train": 250, "t10k": 130}[split], torch.zeros(250, 56, 28, dtype=torch.uint8)
    others = {"(250, 56, 28) and labels": zeros, "(99, 28, 28) and labels": zeros[:99, :28]}
    if kind.startswith("labels"):
        others = {"labels (250, 28) up to 0": zeros[:, 0].int(), "labels (99,) up to 0": zeros[:99, 0, 0]}
        others[f"labels ({count},) up to 26"] = zeros[:count, 0, 0] + 26
    for held, tensor in others.items():
        write_idx(file, tensor)
        message, _ = fail(rnn_mnist, says=f"{file.parent} holds images (")
        assert held in message
        assert "not (N, 28, 28) and (N,) up to 9; see 'Own data' in README.md" in message
    assert sorted(file.parent.iterdir()) == before  # nothing was deleted
    file.rename(data_dir / "other")
    monkeypatch.setattr(datasets.MNIST, "download", Mock(side_effect=RuntimeError("no network")))
    fail(rnn_mnist, says=f"cannot read {file}: it is not there, and cannot be fetched: no network; see --data-dir, or")


def test_evaluate_leaves_mode_and_random_state():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(), nn.Linear(784, 10))
    model[1].eval()  # frozen, as in fine-tuning
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8)), batch_size=4, shuffle=True)
    state, mean, modes = torch.get_rng_state(), model[1].running_mean.clone(), []
    model[2].register_forward_hook(lambda dropout, *_: modes.append((dropout.training, torch.is_grad_enabled())))
    common.evaluate(model, loader)
    assert modes == [(False, False)] * 2  # a pair per batch
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model[1].running_mean, mean)
    with pytest.raises(RuntimeError):
        common.evaluate(model, [(torch.rand(2, 5), torch.zeros(2))])  # which does not fit
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_evaluate_with_labels_of_few_bits(device):
    labels, model = torch.arange(17, dtype=torch.uint8), nn.Linear(17, 17, bias=False).to(device)
    nn.init.eye_(model.weight)
    evaluation = common.evaluate(model, [(nn.functional.one_hot(labels.long()).float(), labels)])
    assert evaluation.confusion.tolist() == torch.eye(17).tolist()
    assert (evaluation.accuracy, evaluation.loss) == pytest.approx((1, math.log(math.e + 16) - 1))


@pytest.mark.parametrize(("split", "seconds"), [("test", 13), ("validation", 12)])
def test_each_epoch_reports_its_own_figures_until_an_interrupt(script, split, seconds, data_dir, fail, monkeypatch):
    file, log, now = data_dir / "weights.pt", data_dir / "log.csv", [0]
    log.write_text("of a former run")
    evaluations = [SimpleNamespace(loss=loss, accuracy=accuracy) for loss, accuracy in ((0.5, 0.9), (0.7, 0.8))]
    monkeypatch.setattr(common, "evaluate", Mock(side_effect=[*evaluations, KeyboardInterrupt]))
    for module in (common, script):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    # Each step takes 1 second, the mean of the losses 10, for which the device has to be done, an evaluation 1,000.
    for owner, name, takes in ((torch.optim.Adam, "step", 1), (torch.Tensor, "mean", 10), (common, "evaluate", 1000)):
        record(monkeypatch, owner, name, lambda *_, takes=takes: now.append(now.pop() + takes))
    options = ["--save", file, "--log", log, *(["--validate", 50] if split == "validation" else [])]
    _, output = fail(script, *options, says="Interrupted.", status=130)
    figures = rf"{split} loss: (\S+), {split} accuracy: (\S+)%, Time: (\S+) s"
    shown = [("0.5000", "90.00", f"{seconds}.00"), ("0.7000", "80.00", f"{seconds}.00")]
    assert re.findall(figures, output, re.IGNORECASE) == shown
    head, *rows = log.read_text().splitlines()
    assert head == f"epoch,train_loss,{split}_loss,{split}_accuracy,seconds"
    rows = [[float(word) for word in row.split(",")] for row in rows]
    assert [row[:1] + row[2:] for row in rows] == [[1, 0.5, 0.9, seconds], [2, 0.7, 0.8, seconds]]
    assert file.is_file()


def test_loss_that_is_not_finite(script, data_dir, train, fail, monkeypatch):
    file, log = data_dir / "weights.pt", data_dir / "log.csv"
    train(script, "--epochs", 1, "--save", file)
    good, says = file.read_bytes(), "the loss is no longer finite after epoch 1; try a smaller --lr"
    for loss, lr in ((0.5, 1e37), (math.inf, 0.001)):  # that of training, and that of the evaluation
        monkeypatch.setattr(common, "evaluate", lambda *_, loss=loss: SimpleNamespace(loss=loss, accuracy=0.1))
        assert "accuracy" not in fail(script, "--save", file, "--log", log, "--lr", lr, says=says)[1]
    assert file.read_bytes() == good
    assert not log.exists()


def test_errors_most_confident_first(tmp_path):
    def draw(images, sure, label):
        logits = torch.stack([sure, torch.zeros(len(images))], dim=1)  # that say class 0, the surer the more of it
        evaluation = SimpleNamespace(logits=logits, labels=torch.full([len(images)], label))
        names = ["zero", "a class with a name of 37 letters 1990"]
        common.draw_errors(tmp_path / "errors.png", evaluation, [(images, evaluation.labels)], names)
        return pil_to_tensor(Image.open(tmp_path / "errors.png"))

    images, sure = torch.rand(129, 1, 28, 28), torch.linspace(0.01, 1, 129)
    sheet = draw(images, sure, 1)
    width = sheet.shape[2] // 10
    assert width > 220  # the whole name
    cells = sheet.unfold(1, 140, 140).unfold(2, width, width)  # (3, 10, 10, 140, width)
    for place, image in ((0, images[128]), (1, images[127]), (99, images[29])):
        cell = cells[:, place // 10, place % 10]
        assert ((cell[:, 4:88:3, 18:102:3] - image * 255).abs() <= 1).all()
    assert draw(images, sure, 0).min() == 255  # all are right: an empty sheet
    images = torch.zeros(1, 3, 14, 28)
    images[:, 0], images[:, 1, 7:] = 1, 0.5  # red above, orange below
    for picture in (images, (images - 0.5) / 0.25):  # the latter from -2 to 2
        colours = draw(picture, torch.ones(1), 1)[:, [10, 32, 62], 62]
        assert colours.T.tolist() == [[255, 0, 0], [255, 127, 0], [255] * 3]


@pytest.mark.parametrize("shape", [(3, 32, 32), (12, 5)], ids=["colour images", "sequences"])
def test_nothing_untrue_is_said_of_data_of_one_s_own(script, shape, tmp_path, train, monkeypatch):
    def report(classes, outputs):
        splits = [TensorDataset(torch.randn(count, *shape), torch.arange(count) % 3) for count in (60, 30)]
        data = common.Data(*(DataLoader(split, batch_size=8) for split in splits), classes)
        monkeypatch.setattr(common, "load_data", lambda args: data)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(math.prod(shape), outputs))
        return train(script, "--epochs", 1, "--errors", tmp_path / "errors.png", model=model)[1].splitlines()

    names = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"]
    header, *lines = report(names, 3)
    assert header.endswith("Data: data of your own (60 training and 30 test samples)")
    assert "mnist" not in "".join(lines).replace(str(tmp_path), "")
    table, matrix = lines[-10:-6], lines[-5:-1]
    assert [(line[:-40].strip(), line.split()[-1]) for line in table[1:]] == [(name, "10") for name in names]
    assert matrix[0].split() == names  # whole
    assert len(set(map(len, table))) == len(set(map(len, matrix))) == 1  # aligned
    assert max(map(len, matrix)) <= 80
    assert report(torch.tensor([3, 5, 7]).numpy(), 3)[-5].split() == ["3", "5", "7"]
    lines = report(["a", "b", "c"], 5)
    assert lines[-7].split() == ["a", "b", "c", "3", "4"]  # more outputs than names
    assert lines[-9].split()[1:] == ["0.0000"] * 3 + ["0"]  # a class without samples
    assert report(list("abcdefgh"), 3)[-5].split() == ["a", "b", "c"]  # fewer


def test_save_and_load(script, device, train, tmp_path, monkeypatch):
    file, sizes = tmp_path / "weights.pt", ["--hidden", 16, "--layers", 3] if script is rnn_mnist else []
    model, output = train(script, "--device", device, "--epochs", 2, "--save", file, *sizes)
    loaded, evaluated = train(script, "--device", device, "--epochs", 0, "--load", file, *sizes)
    assert same_weights(model, loaded)
    assert printed(evaluated, "accuracy") == printed(output, "accuracy")[-1:]
    assert not same_weights(model, train(script, "--device", device, "--epochs", 1, "--load", file, *sizes)[0])
    plain = rnn_mnist.RNN(hidden_size=16, num_layers=3) if sizes else cnn_mnist.CNN()
    plain.load_state_dict(torch.load(file))  # as everybody does
    assert {tensor.device.type for tensor in torch.load(file).values()} == {"cpu"}  # also where there is no GPU
    assert same_weights(plain, model.to("cpu"))
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")  # as if they lay there
    torch.save(model.state_dict(), file)
    assert same_weights(train(script, "--epochs", 0, "--load", file, *sizes)[0], model)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_file_is_replaced_whole_or_not_at_all(failing, data_dir, train, fail, monkeypatch):
    files = [data_dir / "weights.pt", data_dir / "log.csv", data_dir / "errors.png"]
    options = ["--epochs", 1, "--save", files[0], "--log", files[1], "--errors", files[2]]
    train(cnn_mnist, *options)
    before, link = [file.read_bytes() for file in files], data_dir / "link"
    link.hardlink_to(files[0])
    Path(f"{files[failing]}.part").symlink_to("/dev/full")
    says = f"cannot write {files[failing]}: [Errno 28] No space left on device; name another place"
    fail(cnn_mnist, "--seed", 1, *options, says=says)
    kept = [file.read_bytes() == content for file, content in zip(files, before, strict=True)]
    assert kept == [False] * failing + [True] * (3 - failing)  # the weights are written first
    assert link.read_bytes() == before[0]  # replaced, not written over
    monkeypatch.setattr(torch, "save", Mock(side_effect=KeyboardInterrupt))
    fail(cnn_mnist, *options, says="Interrupted.", status=130)
    assert not list(data_dir.glob("*.part"))
    (data_dir / "folder.png").mkdir()
    for place in (data_dir / "folder.png", data_dir / "missing/file.png"):
        says = f"cannot write {place}: it is a folder, or its folder is not there"
        assert fail(cnn_mnist, options[2 + 2 * failing], place, says=says)[1] == ""  # before the first step


def test_load_refuses_another_file(script, data_dir, train, fail, monkeypatch):
    file, trace = data_dir / "weights.pt", data_dir / "trace"
    fail(script, "--load", file, says=f"cannot load {file} ([Errno 2] No such file or directory")
    model, _ = train(script, "--epochs", 1, "--save", file)
    saved, whole = torch.load(file), file.read_bytes()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which would be torch's default then
    harmful = type("Harmful", (), {"__reduce__": lambda self: (os.mkdir, (str(trace),))})()  # unpickled, makes a folder
    others = [rnn_mnist.RNN(16), rnn_mnist.RNN(128, 3), cnn_mnist.CNN() if script is rnn_mnist else rnn_mnist.RNN()]
    contents = [whole[:-1000], b"seven is a digit", b"", {"weights": harmful}, [], {"weights": saved}]
    for content in [*contents, {**saved, "fc.bias": torch.zeros(11)}, *(other.state_dict() for other in others)]:
        torch.save(content, file)
        if isinstance(content, bytes):
            file.write_bytes(content)
        says = f"cannot load {file} ({'it holds no weights' if content in (b'', []) else ''}"
        message, _ = fail(script, "--epochs", 0, "--load", file, says=says)
        assert f"that --save wrote for this {type(model).__name__}, with the same --hidden and --layers" in message
        assert not trace.exists()


def draw_page(digit):
    """A picture of one digit, dark on light, off the middle."""
    picture = Image.new("L", (500, 400), 255)
    ImageDraw.Draw(picture).text((250, 120), str(digit), fill=0, font_size=200)
    return picture


def with_grain(picture, sigma):
    return ImageChops.add(picture, Image.effect_noise(picture.size, sigma).convert(picture.mode), offset=-128)


TABLE = ImageOps.expand(Image.new("L", (400, 350), 255), (100, 0, 0, 50), fill=90)
RULES = to_pil_image((200 + 55 * (torch.arange(400) % 40 > 2)).to(torch.uint8).view(-1, 1).expand(400, 500))
FORMS = {
    "on a table": lambda page: ImageChops.multiply(page, TABLE),
    "ruled paper": lambda page: ImageChops.multiply(page, RULES),
    "coloured grainy paper": lambda page: with_grain(ImageOps.colorize(page, "darkslategray", "khaki"), 40),
    "thin pencil": lambda page: with_grain(page.filter(ImageFilter.MaxFilter(9)).point(lambda x: 100 + x // 2), 10),
    "thick felt pen": lambda page: page.filter(ImageFilter.MinFilter(9)).crop((245, 150, 390, 320)),
    "grey patch on white": lambda page: ImageOps.expand(page.point(lambda x: x * 200 // 255), 100, fill=255),
    "turned by EXIF": lambda page: page.transpose(Image.Transpose.ROTATE_90),
    "dark on glass": lambda page: Image.merge("LA", (Image.new("L", page.size, 0), ImageOps.invert(page))),
    "light on glass": lambda page: Image.merge("LA", (Image.new("L", page.size, 255), ImageOps.invert(page))),
    "16 bits": lambda page: Image.fromarray((pil_to_tensor(page)[0].int() * 99 + 9999).numpy().astype("uint16")),
}


@pytest.mark.parametrize("form", FORMS)
def test_picture_of_any_form(form, tmp_path):
    for digit in (2, 4, 5, 7):
        page = draw_page(digit)
        picture = FORMS[form](page)
        exif = picture.getexif()
        exif[0x0112] = 6 if "EXIF" in form else 1  # orientation: to be shown turned a quarter clockwise, or as it is
        picture.save(tmp_path / "other.png", exif=exif)
        plain, other = common.mnist_form(common.grey_levels(page)), common.read_picture(tmp_path / "other.png")
        assert 0.06 < other.mean() < 0.18  # near the 0.1307 of MNIST, however thin the pencil and thick the pen
        # A pen has another width, which costs up to 0.6, a larger page 0.3; another digit costs more than 1.
        assert (plain - other).abs().sum() < (0.6 if "pen" in form else 0.4) * plain.sum()


def test_picture_is_upright_and_its_centre_of_mass_where_mnist_has_it():
    for digit in range(10):
        page = ImageOps.invert(draw_page(digit))
        image = common.mnist_form(common.grey_levels(page))[0]
        small = pil_to_tensor(ImageOps.contain(page.crop(page.getbbox()), (19, 19), Image.Resampling.BOX))[0] / 255
        mass = [small.sum(dim=1 - dim) @ torch.arange(0.0, small.shape[dim]) / small.sum() for dim in (0, 1)]
        expected = torch.zeros(28, 28)
        expected[: small.shape[0], : small.shape[1]] = small
        expected = expected.roll([round(14 - place.item()) for place in mass], dims=(0, 1))
        assert torch.corrcoef(torch.stack([image.flatten(), expected.flatten()]))[0, 1] > 0.8


def test_predict(script, data_dir, train, fail):
    file, wanted = data_dir / "weights.pt", ""
    model, _ = train(script, "--epochs", 10, "--batch-size", 25, "--lr", 0.003, "--save", file)
    for digit in range(3):
        draw_page(digit).save(data_dir / f"{digit}.png")
        logits = model(common.read_picture(data_dir / f"{digit}.png").unsqueeze(0))
        confidence, label = logits.softmax(dim=1).max(dim=1)
        wanted += f"{data_dir / str(digit)}.png: {label.item()} ({confidence.item():.1%})\n"
    with_grain(Image.new("L", (300, 200), 240), 4).save(data_dir / "blank.png")
    (data_dir / "text.png").write_text("seven")
    (data_dir / "cut.png").write_bytes((data_dir / "2.png").read_bytes()[:-500])
    bad = {"blank.png": "there is nothing", "text.png": "cannot identify", "cut.png": "", "missing.png": "No such file"}
    names = ["0.png", *bad, "1.png", "2.png"]
    options = ["--data-dir", data_dir / "missing", "--load", file, "--predict", *(data_dir / name for name in names)]
    message, output = fail(script, *options, says="error: cannot read a digit from ")
    assert output == wanted
    for name, reason in bad.items():
        assert re.search(f"cannot read a digit from {data_dir / name}: [^;]*{reason}", message)
    for outputs, names in ((3, "012"), (10, datasets.FashionMNIST.classes)):
        other = nn.Sequential(nn.Flatten(), nn.Linear(784, outputs))
        torch.save(other.state_dict(), file)
        options = ["--load", file, "--dataset", "fashion-mnist", "--predict", data_dir / "0.png"]
        _, output = train(script, *options, model=other)
        assert re.fullmatch(r".*0\.png: (.*) \(\d+\.\d%\)\n", output)[1] in names
