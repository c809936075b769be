"""Train an LSTM on MNIST: an image is a sequence of 28 time steps (rows) of 28 pixels.

python rnn_mnist.py --hidden 128
python rnn_mnist.py --one-cycle --augment --save rnn.pt
"""

import time

import torch
from torch import nn

import common


class RNN(nn.Module):
    """Map images (N, 1, 28, 28) in [0, 1], or sequences (N, T, 28), to logits (N, 10).

    There is no softmax, because CrossEntropyLoss applies it.
    """

    def __init__(self, hidden_size=128, num_layers=2):
        super().__init__()
        # batch_first, because the first dimension of the images is the batch. Without it, the LSTM
        # would treat the images of a batch as time steps.
        self.lstm = nn.LSTM(28, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, 10)

    def forward(self, x):
        if x.dim() == 4:
            x = x.squeeze(1)  # (N, 28, 28), without the channel of an image
        out, _ = self.lstm(x)  # (N, T, hidden_size)
        return self.fc(out[:, -1])  # (N, 10), from the last time step, which has seen all rows


def main(argv=None, model=None, data=None):
    """Train a network with the options in `argv`; return it and its last evaluation.

    argv: a list, or a string that is split at spaces; by default, the command line.
    model: a network, which is trained in place; or a class or function, which is called after the
    seed is set, and returns a new network. By default, it is the RNN above; with another network,
    --hidden and --layers have no effect.
    data: a common.Data; by default, the dataset that the options select. If it is given, --dataset,
    --data-dir, --batch-size, --limit and --validate have no effect.
    With --predict, nothing is trained, and the evaluation is None.
    """
    # options
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("network (--load: use the saved network's values)").add_argument
    number = {"type": common.positive_int, "metavar": "N"}
    add("--hidden", **number, default=128, help="hidden size (default: %(default)s)")
    add("--layers", **number, default=2, help="number of LSTM layers (default: %(default)s)")
    args = common.parse_args(parser, argv)
    common.set_up(args.seed)

    # model
    if model in (None, RNN):
        model = RNN(args.hidden, args.layers)
    elif not isinstance(model, nn.Module):
        model = model()
    model.to(args.device)
    if args.load:
        common.load_weights(model, args.load)
    if args.predict:
        common.predict_pictures(model, args)
        return model, None

    # data
    data = data or common.load_data(args)
    steps = len(data.train_loader)
    common.print_header(args, model, data)

    # train
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # fused: faster
    if args.one_cycle:
        total_steps = max(1, args.epochs * steps)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        losses = []
        model.train()
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            images, labels = images.to(args.device), labels.to(args.device)
            if args.augment:
                images = common.random_affine(images)
            logits = model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.one_cycle:
                scheduler.step()
            losses.append(loss.detach())
            if step % 100 == 0 or step == steps:
                print(f"Epoch [{epoch}/{args.epochs}], Step [{step}/{steps}], Loss: {loss:.4f}")
        evaluation = common.end_epoch(args, epoch, model, data, losses, start)

    # report
    if args.epochs < 1:
        evaluation = common.evaluate(model, data.eval_loader)
    common.report(args, data, evaluation)
    return model, evaluation


if __name__ == "__main__":
    model, evaluation = common.run(main)  # a notebook can use both afterwards
