"""`finetune` itself on a tiny pipeline of each backbone: from folders to a stock pipeline and an adapter, and back."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_pipelines
from davae.backbones import backbone_of
from davae.data.sources import open_pictures
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample
from davae.pipelines.saving import save_pipeline
from davae.training.stage_two import choose_objective
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from scenes import scene

# Of diffusers' DPM solver: numpy is given a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES = [name for name in tiny_pipelines.PIPELINES if name not in ("sd3", "pixart-alpha", "lightningdit")]
NOISE = ("pixart-sigma", "dit")
C = tiny_pipelines.CHANNELS


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for index in range(10):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(scene(index)).save(path)
    return root


@pytest.fixture(params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recipe(name: str, tmp_path: Path, picture_folder: Path, class_folder: Path) -> FinetuneRecipe:
    with torch.random.fork_rng(devices=[]):
        base = tiny_pipelines.PIPELINES[name]()
        torch.manual_seed(5)
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=C).eval()
        torch.nn.init.normal_(autoencoder.detail_downsample.shortcut.weight, std=0.3)
    classes = backbone_of(base.transformer).classes
    folder = class_folder if classes else picture_folder
    pictures = open_pictures(folder, size=64, split="train", classes=classes)
    autoencoder.calibrate([pictures.batch(range(len(pictures)))])
    save_pipeline(base, tmp_path / "base")
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    return FinetuneRecipe(
        base=str(tmp_path / "base"),
        autoencoder=str(tmp_path / "autoencoder"),
        pictures=str(folder),
        size=64,
        trained="layers" if name in NOISE else "lora",
        lora_rank=2,
        steps=3,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=0,
        detail_warmup_steps=2,
        prompt_tokens=32,
        ema_decay=0.0,
        precision="float32",
    )


def made(pipeline) -> torch.Tensor:
    tiny_pipelines.quiet(pipeline)
    if not backbone_of(pipeline.transformer).classes:
        quick = {"seed": 0, "steps": 2, "guidance_scale": 2.0, "prompt_tokens": 32, "size": 64}
        return sample(pipeline, ["a red ball"], **quick).float()
    random = torch.Generator().manual_seed(0)
    return pipeline([1], num_inference_steps=2, guidance_scale=1.0, generator=random, output_type="pt").images * 255


def test_a_run_ends_in_a_stock_pipeline_and_an_adapter_that_makes_the_same(recipe, name, tmp_path):
    run = tmp_path / "run"
    saved = finetune(recipe, run)
    pipeline = load_pipeline(saved)
    assert type(pipeline).__name__ == json.loads((tmp_path / "base" / "model_index.json").read_text())["_class_name"]

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "base_loss" in line]
    assert [line["step"] for line in losses] == [0, 2]  # the first and the last are on record
    assert all(("variance_loss" in line) == (name in NOISE) for line in losses)
    assert all(value == value for line in losses for value in line.values())

    picture = made(pipeline)
    applied = load_pipeline(tmp_path / "base", adapter=run / "adapter")
    assert (made(applied) - picture).abs().max() <= 1
    ports = backbone_of(pipeline.transformer).ports
    output, base = pipeline.transformer.get_submodule(ports.output).weight, load_pipeline(tmp_path / "base").transformer
    assert output.count_nonzero() > 1.5 * base.get_submodule(ports.output).weight.count_nonzero()  # detail is learnt


@pytest.mark.parametrize("name", NOISE, indirect=True)
@pytest.mark.parametrize(
    "setting",
    [{"shift": 2.0}, {"cosine_weight": 1.0}, {"data_objective": True}, {"data_objective": True, "min_snr": 5.0}],
)
def test_settings_of_flow_models_are_refused_for_those_that_predict_noise(name, setting):
    with pytest.raises(SettingsError, match=r"predicts noise, and these settings are for flow models"):
        choose_objective(tiny_pipelines.PIPELINES[name](), base_channels=C, positions=64, **setting)


def test_a_scheduler_of_the_other_kind_is_refused():
    flow, noise = tiny_pipelines.flux(), tiny_pipelines.dit()
    flow.scheduler, noise.scheduler = noise.scheduler, flow.scheduler
    with pytest.raises(SettingsError, match=r"FlowMatchEuler.*a model that predicts noise needs one"):
        choose_objective(noise, base_channels=C, positions=64)
    with pytest.raises(SettingsError, match="DDIMScheduler, has neither shift nor flow_shift"):
        choose_objective(flow, base_channels=C, positions=64)


@pytest.mark.parametrize("name", NOISE, indirect=True)
def test_lora_of_a_class_that_diffusers_gives_no_adapters_is_refused(recipe, name, tmp_path):
    with pytest.raises(SettingsError, match=r'has no LoRA in diffusers.*trained="layers", "full" and "ports"'):
        finetune(recipe.model_copy(update={"trained": "lora"}), tmp_path / "run")
