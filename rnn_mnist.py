"""Train an LSTM of two layers on MNIST, read row by row: an image is a sequence of 28 time steps of 28 pixels.

python rnn_mnist.py --hidden 128
python rnn_mnist.py --one-cycle --augment --save rnn.pt
"""

import time

import torch
from torch import nn

import common


class RNN(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] to logits (N, 10): no softmax, CrossEntropyLoss has its own."""

    def __init__(self, hidden_size=128, num_layers=2):
        super().__init__()
        # batch_first, because the loader's first dimension is the batch: else the LSTM takes images for time steps.
        self.lstm = nn.LSTM(input_size=28, hidden_size=hidden_size, num_layers=num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, 10)

    def forward(self, x):
        out, _ = self.lstm(x.squeeze(1))  # (N, 28, hidden_size)
        return self.fc(out[:, -1])  # (N, 10), from the last time step, which has seen all 28 rows


def main(argv=None, model=None):
    """Train `model`, or an RNN, as the options `argv` say; return it, and what evaluate found in the end."""
    # options
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--hidden", type=common.positive, default=128, metavar="N", help="units per LSTM (default: %(default)s)")
    add("--layers", type=common.positive, default=2, metavar="N", help="stacked LSTMs (default: %(default)s)")
    args = common.parse_args(parser, argv)
    torch.manual_seed(args.seed)

    # model
    model = (model or RNN(args.hidden, args.layers)).to(args.device)
    if args.load:
        common.load_weights(model, args.load)
    if args.predict:
        common.predict_pictures(model, args)
        return model, None

    # data
    data = common.load_data(args)
    steps = len(data.train_loader)
    common.print_header(args, model, data)

    # train
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one pass over all weights
    if args.one_cycle:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(1, args.epochs * steps))
    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), []
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            if args.augment:
                images = common.random_affine(images)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
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
    model, evaluation = common.run(main)
