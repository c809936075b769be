"""Train an LSTM of two layers on MNIST, read row by row: an image is a sequence of 28 time steps of 28 pixels.

python rnn_mnist.py --dataset synthetic --epochs 1
python rnn_mnist.py --hidden 128
python rnn_mnist.py --one-cycle --augment --save rnn.pt
python rnn_mnist.py --load rnn.pt --predict my_digit.png
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

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


def main(argv=None):
    """Train and evaluate as the command line `argv` says; return the trained model."""
    # options
    parser = common.make_parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--hidden", type=common.at_least(1), default=128, metavar="N", help="units per LSTM (default: %(default)s)")
    add("--layers", type=common.at_least(1), default=2, metavar="N", help="stacked LSTMs (default: %(default)s)")
    args = common.parse_args(parser, argv)
    common.prepare_process(args.seed)

    # model
    model = RNN(args.hidden, args.layers).to(args.device)
    if args.load:
        common.load_weights(model, args)
    if args.predict:
        common.predict_pictures(model, args)
        return model

    # data
    data = common.load_data(args)
    steps = len(data.train_loader)

    # loss and optimizer
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)  # one pass over all weights
    if args.one_cycle:
        scheduler = OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.epochs * steps or 1)

    # train
    common.print_header(args, model, data)
    for epoch in range(1, args.epochs + 1):
        progress, loss_sum, count = f"Epoch [{epoch}/{args.epochs}]", 0, 0
        start = common.clock(args.device)
        for step, (images, labels) in enumerate(data.train_loader, start=1):
            if args.augment:
                images = common.random_affine(images)
            # forward
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp), common.lstm_kernels(args):
                logits = model(images)
                loss = criterion(logits, labels)
            # backward and step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.one_cycle:
                scheduler.step()
            loss_sum, count = loss_sum + loss.detach() * len(labels), count + len(labels)
            if step % 100 == 0 or step == steps:
                common.check_finite(loss.item(), epoch, step)
                print(f"{progress}, Step [{step}/{steps}], Loss: {loss:.4f}")
        seconds = common.clock(args.device) - start
        evaluation = common.evaluate(model, data.eval_loader)
        common.check_finite(evaluation.loss, epoch, steps)
        print(f"{progress}, {common.scores(data, evaluation)}, Time: {seconds:.2f} s")
        if args.log:
            common.log_epoch(args, data, epoch, loss_sum / count, evaluation, seconds)
        if args.save:
            common.save_weights(model, args, data, epoch)

    # report
    if not args.epochs:
        evaluation = common.evaluate(model, data.eval_loader)
    common.report(args, data, evaluation)
    return model


if __name__ == "__main__":
    model = common.run(main)
