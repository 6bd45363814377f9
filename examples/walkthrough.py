# SPDX-License-Identifier: Apache-2.0
"""From a folder of good images to an OpenVINO model that writes down what it finds, step by step.

    python examples/walkthrough.py --good path/to/good --defective path/to/defective

Read it from top to bottom. Each step can be copied on its own, and leaves its outcome in the output folder:

    1_paint.png       what the model is going to be trained with
    2_run/            checkpoint, logs, and a picture of every image that was not trained on
    3_pictures.html   all pictures on one page
    4_scores.txt      scores of the images that were not trained on
    5_model/          the exported model
    6_camera/         what the exported model finds in a folder of images: regions.csv, and one picture each

Needs `pip install "anomalib[openvino]>=2.7,<2.8" "torch>=2.8"`; with `tensorboard` installed, training can be watched.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from anomalib.data import Folder
from anomalib.data.utils.image import is_image_file
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.loggers import AnomalibTensorBoardLogger
from lightning.pytorch import seed_everything
from PIL import Image, ImageDraw

from anomalib_twostage import Region, StageVisualizer, TwoStageSuperpixel, find_regions, preview, write_regions

VALIDATIONS = 4  # per run; each also shows painted examples in TensorBoard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=Path, required=True, help="folder of good images")
    parser.add_argument("--defective", type=Path, required=True, help="folder of some defective images")
    parser.add_argument("--camera", type=Path, help="folder to run the exported model on (the defective images)")
    parser.add_argument("--out", type=Path, default=Path("walkthrough"), help="output folder (%(default)s)")
    parser.add_argument("--image_size", type=int, default=256, help="side of the model's input (%(default)s)")
    parser.add_argument("--segment_size", type=int, help="side of a superpixel in it (the variant's own)")
    parser.add_argument("--variant", default="default", help="default, scratch, small or paper (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="scaled score of an alarm (%(default)s)")
    parser.add_argument("--min_area", type=int, default=4, help="smallest region, in pixels of the map (%(default)s)")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    seed_everything(0)

    # 1. Paint. The model learns from paint on good images, so look at the paint first: are your defects as large as
    #    some of it, and at least as visible as the faintest?
    preview.main([str(options.good), "--out", str(out / "1_paint.png"), "--image_size", str(options.image_size)])

    # 2. Train. anomalib keeps a fifth of the good images for testing; half of those and half of the defective ones
    #    serve the validation, which also measures the threshold.
    data = Folder(
        name="parts",
        normal_dir=options.good.resolve(),
        abnormal_dir=options.defective.resolve(),
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        seed=0,
    )
    model = TwoStageSuperpixel(
        variant=options.variant,
        segment_size=options.segment_size,
        pre_processor=TwoStageSuperpixel.configure_pre_processor((options.image_size, options.image_size)),
        visualizer=StageVisualizer(output_dir=out / "2_run" / "pictures"),
    )
    every = max(1, options.steps // VALIDATIONS)
    engine = Engine(
        default_root_dir=out / "2_run",
        max_epochs=-1,
        max_steps=VALIDATIONS * every,
        val_check_interval=every,  # in steps, whatever the number of images: the last one is at the very end
        check_val_every_n_epoch=None,
        logger=AnomalibTensorBoardLogger(str(out / "2_run" / "logs")) if find_spec("tensorboard") else False,
    )
    engine.fit(model, datamodule=data)

    # 3. Look. The metrics of the test images are printed; then all images that were not trained on get a picture, and
    #    the pictures a page for the browser. It shows which stage found a defect, or lost it.
    engine.test(model, datamodule=data)
    kept = [data.val_dataloader(), data.test_dataloader()]
    predictions = [batch for loader in engine.predict(model, dataloaders=kept) for batch in loader]
    pictures = sorted(path for path in (out / "2_run" / "pictures").rglob("*") if path.is_file())
    lines = [f'<p><img src="{picture.relative_to(out).as_posix()}">' for picture in pictures]
    (out / "3_pictures.html").write_text("\n".join(["<!doctype html><title>Stages</title>", *lines]) + "\n")

    # 4. Set the threshold. Scores run from 0 to 1, scaled so that the threshold with the best F1 on the validation
    #    images is 0.5. Read the list of scores and choose: higher spares false alarms, lower finds more.
    items = sorted((item for batch in predictions for item in batch), key=lambda item: float(item.pred_score))
    model.post_processor.image_sensitivity = 1 - options.threshold
    lines = [
        f"{float(item.pred_score):.3f}  {'defective' if item.gt_label else 'good     '}  {Path(item.image_path).name}"
        for item in items
    ]
    (out / "4_scores.txt").write_text("\n".join(lines) + "\n")
    alarms = [bool(item.gt_label) for item in items if item.pred_score > options.threshold]
    defective = sum(bool(item.gt_label) for item in items)
    print(f"At threshold {options.threshold}: {sum(alarms)} of {defective} defective images found, ", end="")
    print(f"{len(alarms) - sum(alarms)} false alarms on {len(items) - defective} good ones.")

    # 5. Export. The file holds everything: resizing, both stages, superpixels, scaling and threshold.
    exported = engine.export(model, ExportType.OPENVINO, export_root=out / "5_model")

    # 6. Run it, as a line would. OpenVINO reads the file alone, and rounds to bfloat16 where a processor has it, unless
    #    told otherwise; a camera's picture can also be handed over as an array (H, W, 3). The verdict is printed, and
    #    the regions of all images, where the map is above 0.5, go to one table with their boxes in pixels of the file;
    #    the pictures show the boxes.
    inferencer = OpenVINOInferencer(exported, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    (out / "6_camera").mkdir(exist_ok=True)
    regions: list[Region] = []
    for path in sorted(path for path in (options.camera or options.defective).iterdir() if is_image_file(path)):
        prediction = inferencer.predict(path)
        verdict = "anomalous" if prediction.pred_label.item() else "normal"
        print(f"{path.name}: {verdict}, score {prediction.pred_score.item():.3f}")
        prediction.image_path = [str(path)]
        image = Image.open(path).convert("RGB")
        size = (image.height, image.width)
        found = find_regions(prediction, threshold=0.5, min_area=options.min_area, image_sizes=[size])
        for region in found:
            ImageDraw.Draw(image).rectangle(region.image_box, outline=(255, 0, 0), width=2)
        image.save(out / "6_camera" / path.name)
        regions += found
    write_regions(regions, out / "6_camera" / "regions.csv")
    print(f"All of it lies in {out}.")


if __name__ == "__main__":
    main()
