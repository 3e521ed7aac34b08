"""Fits a linear SVM to each class of a model that classifies segments (model=cfm), as R-CNN does.

The SVMs are fitted to the features of the model. Positives are the ground-truth masks of things and
the segments that segment pursuit selects for stuff; negatives are the segments with a small overlap
with both. Writes the model with the SVMs as a checkpoint for tools/evaluate.py and
tools/predict.py. The keys are those of configs/fit_svm.yaml and of the checkpoint's own config.

  python tools/fit_svm.py checkpoint=runs/scenes_cfm/TIME output=DIR
  python tools/fit_svm.py checkpoint=best.pt output=DIR fit.C=0.01 fit.positive_weight=1 \\
      fit.flip=true
  python tools/evaluate.py checkpoint=DIR output=EVALUATION model.classifier.score_threshold=0.5

With more segments, which take 4 bytes per feature of each:

  python tools/fit_svm.py checkpoint=best.pt output=DIR fit.negatives=2000 fit.max_samples=400000
"""

from __future__ import annotations

from maskseg.variants.cfm import fit_svm


def main(arguments: list[str]) -> None:
    """Entry point of `tools/fit_svm.py`."""
    fit_svm.fit(arguments)
