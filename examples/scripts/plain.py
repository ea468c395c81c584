"""Thirty lines, no command line: handwritten digits with the recipe for vision.  python -m examples.scripts.plain"""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_eff
from examples.digits import DigitsDataModule, DigitsModule


def main(steps: int = 230, folder: str = "logs/plain") -> L.Trainer:
    L.seed_everything(0, verbose=False)
    callbacks = lightning_eff.recipe("vision", steps)
    callbacks.append(ModelCheckpoint(folder, monitor="ema/val_loss", save_last="link"))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name=None),
        log_every_n_steps=10,
    )
    # Start it again after a kill, or a queue's time limit, and it goes on from the last checkpoint, if there is one.
    trainer.fit(DigitsModule(), datamodule=DigitsDataModule(), ckpt_path="last")
    return trainer


if __name__ == "__main__":
    print(main().callback_metrics["ema/val_acc"])
