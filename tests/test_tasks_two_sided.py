"""Models of images and texts: a head of the classes' names, without a single image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import write_words
from pictures import write_pictures
from torch import nn
from torch.nn.functional import normalize

import svftool
from svftool.errors import ModelError
from svftool.tasks.classification import Classification
from svftool.tasks.two_sided import ImageTextClassifier, has_text_side
from svftool.training import Settings

transformers = pytest.importorskip("transformers")

SIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2}  # fmt: skip
NAMES = ("red_card", "green_card", "blue_fee")


def two_sided(kind: str = "CLIP", words: int = 40) -> Any:
    text = {**SIDE, "vocab_size": words, "max_position_embeddings": 9}
    text |= {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    vision = {**SIDE, "image_size": 16, "patch_size": 8}
    more = {"projection_dim": 16, "logit_scale_init_value": 3.0} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():  # initial weights are too small to tell names apart
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and pictures."""
    folder = tmp_path_factory.mktemp("two")
    write_words(folder / "words")
    pictures = write_pictures(folder / "data", count=3)
    for old, new in zip(("red", "green", "blue"), NAMES, strict=True):
        (pictures / old).rename(pictures / new)
    return folder


def task(work: Path, **options: Any) -> Classification:
    options = {"shots": 1, "head_init": "names", "image_size": 16, **options}
    return Classification(work / "data", folder=work / "words", **options)


@pytest.mark.parametrize("head_type", ["linear", "cosine"])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_logits_are_those_of_images_and_names(work: Path, kind: str, head_type: str) -> None:
    model = two_sided(kind)
    made = task(work, head_type=head_type)
    draw = made.draw(0)
    for start in (True, False):  # no example is needed
        prepared = draw.prepare(model, start=start)
        assert prepared.begin is not None
        if not start:
            prepared.begin()
        assert isinstance(prepared.model, ImageTextClassifier)
        assert (prepared.head, prepared.new_head) == ("head", True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "words")
    names = [name.replace("_", " ") for name in made.classes]
    inputs = tokenizer(names, padding="max_length", max_length=9, return_tensors="pt")
    taken = ("input_ids", "attention_mask")
    images, _ = draw.batch(torch.arange(3), torch.Generator())
    with torch.inference_mode():
        both = model(pixel_values=images, **{name: inputs[name] for name in taken})
        found = prepared.model(images)
    cosine = both.image_embeds @ both.text_embeds.mT
    assert torch.equal(found.argsort(1), cosine.argsort(1))
    torch.testing.assert_close(found, model.logit_scale.exp() * cosine, rtol=1e-4, atol=1e-4)
    # Whatever tells the names apart does: rows of one name for all would be found out.
    assert float(cosine.std(dim=1).min()) > 1e-3


def test_class_means_and_random_heads_are_made_in_the_same_space(work: Path) -> None:
    model = two_sided()
    draw = task(work, head_init="means", augment="none").draw(0)
    prepared = draw.prepare(model)
    images, labels = draw.batch(torch.arange(3), torch.Generator())
    with torch.no_grad():
        means = normalize(model.get_image_features(pixel_values=images).pooler_output, dim=-1)
    weight = normalize(prepared.model.get_parameter("head.weight"), dim=-1)
    assert (weight[labels] * means).sum(1).min() > 0.9999
    one, same, other = (
        task(work, head_init="random").draw(seed).prepare(two_sided()).model.head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class Plain(nn.Module):
    """A network of images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3))


def test_what_has_no_text_side_or_another_vocabulary_is_refused(work: Path, tmp_path: Path) -> None:
    draw = task(work).draw(0)
    assert not has_text_side(Plain())
    with pytest.raises(ModelError, match="--head-init names: Plain has no text side") as caught:
        draw.prepare(Plain())
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ModelError, match=r"the model has embeddings for 5\. Name its own tokenizer"
    ):
        draw.prepare(two_sided(words=5))
    with pytest.raises(ModelError, match="expected no --head-name"):
        task(work, head_name="visual_projection").draw(0).prepare(two_sided())
    with pytest.raises(ModelError, match="no tokenizer"):
        task(work, tokenizer=tmp_path).draw(0).prepare(two_sided())


def test_a_head_of_names_is_measured_and_tuned_from_files(work: Path, tmp_path: Path) -> None:
    base, tuned = tmp_path / "clip", tmp_path / "tuned.svf.safetensors"
    two_sided().save_pretrained(base)
    write_words(base)
    options: dict[str, Any] = {"data": work / "data", "task": "classification"}
    options["image_size"] = 16
    zero = svftool.evaluate(base, head_init="names", **options)
    svftool.decompose(base, tmp_path / "factors")
    svftool.finetune(
        tmp_path / "factors",
        output=tuned,
        shots=1,
        head_init="names",
        settings=Settings(steps=1, lr=1e-9),
        **options,
    )
    # All but no step: the head that was written is nearly the one that names make.
    again = svftool.evaluate(tmp_path / "factors", tuned=tuned, **options)
    assert again.runs[0].metrics == pytest.approx(zero.runs[0].metrics, rel=1e-2)
    assert again.settings["head_init"].value == "names"
    # The head is there: neither the names nor a tokenizer are asked for.
    for path in base.glob("*token*"):
        path.unlink()
    without = svftool.evaluate(tmp_path / "factors", tuned=tuned, **options)
    assert without.runs[0].metrics == again.runs[0].metrics
    (row, *_) = svftool.predict(tmp_path / "factors", work / "data", tuned=tuned).rows
    assert row["prediction"] in NAMES
