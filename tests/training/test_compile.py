"""Stage 2 with compiled blocks: the same run but for rounding, and nothing of it in what is saved."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from davae.errors import SettingsError
from davae.pipelines.loading import load_pipeline
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from hashes import digests
from rank_forks import FSDP2, run_ranks
from stages import finetune_recipe, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's, about itself


@pytest.fixture(scope="module")
def recipe(base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path_factory) -> FinetuneRecipe:
    own = {"steps": 4, "checkpoint_every": 2, "learning_rate": 1e-2, "precision": "float32"}
    cache = str(tmp_path_factory.mktemp("cache"))
    return finetune_recipe(base_folder, autoencoder_folder, picture_folder, **own, cache=cache)


@pytest.fixture(scope="module")
def eager(recipe: FinetuneRecipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eager")
    finetune(recipe, folder)
    return folder


def gone_back(eager: Path, folder: Path) -> Path:
    """A copy of the run as it was after two steps."""
    shutil.copytree(eager, folder)
    for path in (folder / "checkpoints" / "step-00000004", folder / "pipeline", folder / "adapter"):
        shutil.rmtree(path)
    return folder


def compiled(recipe: FinetuneRecipe) -> FinetuneRecipe:
    return recipe.model_copy(update={"compile": True})


def test_a_run_goes_on_with_compiled_blocks_and_saves_the_same_names(
    recipe: FinetuneRecipe, eager: Path, tmp_path: Path
) -> None:
    """torch's stance lets compiled modules run as they are: all but the compiler's own work, which takes minutes."""
    folder = gone_back(eager, tmp_path / "run")
    with torch.compiler.set_stance("force_eager"):
        finetune(compiled(recipe), folder)
    assert outcome(folder) == outcome(eager)
    assert compiled(recipe).digest() == recipe.digest()
    assert "compile = true" in (folder / "recipe.toml").read_text()
    finetune(recipe, folder)  # and back, of which nothing is left to do
    assert outcome(folder) == outcome(eager)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_blocks_compute_the_same_but_for_rounding(recipe: FinetuneRecipe, eager: Path, tmp_path: Path) -> None:
    folder = gone_back(eager, tmp_path / "run")
    before = counters["stats"]["unique_graphs"]
    finetune(compiled(recipe), folder)
    assert counters["stats"]["unique_graphs"] > before

    losses, expected = ([line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in (folder, eager))
    assert len(losses) == 4
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[:2] == expected[:2], "of before"
    assert digests(folder / "pipeline").keys() == digests(eager / "pipeline").keys()

    pictures = []
    for made in (folder, eager):
        pipeline = load_pipeline(made / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        told = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
        pictures.append(pipeline("red ball", generator=torch.Generator().manual_seed(0), **told).images)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-2)


def test_with_weights_in_parts_it_is_refused(recipe: FinetuneRecipe, tmp_path: Path) -> None:
    def program() -> None:
        with pytest.raises(SettingsError, match=r"compile = true with FSDP2: .*ddp\.yaml"):
            finetune(compiled(recipe), tmp_path / "run")

    assert run_ranks(program, 2, FSDP2) == [0, 0]
    assert not (tmp_path / "run").exists()
