"""What an evaluation says of a classifier beside its figures."""

from tlcli.metrics.evaluation import no_better_than_majority


def found(accuracy, baseline, recalls):
    per_class = [{"recall": recall, "support": 5} for recall in recalls] + [{"recall": 0.0, "support": 0}]
    shares = {"top1_accuracy": accuracy, "majority_baseline": baseline}
    return {**shares, "num_images": 20, "per_class": per_class}


def test_what_is_no_better_than_one_class_is_said():
    text = no_better_than_majority(found(0.6, 0.6, [1.0, 0.0]), balanced=False)
    assert "0.600 on 20 images" in text
    assert "data check" in text
    assert no_better_than_majority(found(0.61, 0.6, [1.0, 0.1]), balanced=False) is None
    assert no_better_than_majority(found(1.0, 1.0, [1.0]), balanced=False) is None


def test_where_classes_weigh_the_same_recalls_are_compared_with_chance():
    assert no_better_than_majority(found(0.5, 0.9, [0.5, 0.9]), balanced=True) is None
    assert "balanced" in no_better_than_majority(found(0.95, 0.9, [1.0, 0.0]), balanced=True)
