"""The paper's recipes (section IV-B), read off the optimiser and the schedule that the scripts build."""

import dataclasses
import re

import pytest
import torch
from training_tools import SCRIPTS, script

from hf_s2e import S2EForAudioClassification
from hf_s2e.model.adapter_layers_s2e import part_of
from hf_s2e.training.arguments import RepoArguments, parse_arguments
from hf_s2e.training.methods import METHODS, build_model
from hf_s2e.training.recipe import Recipe, make_optimizer, make_scheduler, read_recipe

STEPS = 7  # an epoch
EMOTION = {1: 1e-2, 10: 1e-2, 11: 1e-3, 20: 1e-3, 21: 1e-4, 30: 1e-4}  # epoch -> learning rate
SPEAKER = {1: 5e-2, 10: 5e-2, 11: 5e-2, 20: 5e-2, 21: 5e-3, 30: 5e-3}
WEIGHT_DECAY = {"iemocap": 5e-3, "cheavd": 1e-3, "emodb": 5e-3, "ravdess": 5e-3}
PARTS = {
    "plain": {"shared", "bn", "fc"},
    "feature_extractor": {"fc"},
    "fine_tune": {"shared", "bn", "fc"},
    "residual_adapter": {"alpha", "bn", "fc"},
    "residual_adapter_source": {"alpha", "bn", "fc"},
    "adapter_only": {"alpha", "bn", "fc"},
    "bn_only": {"bn", "fc"},
}


def recipe_of(name: str, file: str | None, *flags: str) -> Recipe:
    """As the script `name` has it with this recipe file."""
    module = script(name)
    recipe = ["--recipe", str(SCRIPTS / "recipes" / f"{file}.yaml")] if file else []
    return parse_arguments(module.Arguments, getattr(module, "PAPER", {}), [*recipe, *flags])[1]


def check_optimizer(model, recipe: Recipe, rates: dict[int, float], weight_decay: float) -> None:
    optimizer = make_optimizer(model, recipe)
    assert type(optimizer) is torch.optim.SGD
    trained = {p for p in model.parameters() if p.requires_grad}
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(trained) and set(grouped) == trained
    scheduler = make_scheduler(optimizer, recipe, STEPS)
    assert recipe.num_train_epochs == 30
    for step in range(30 * STEPS):
        epoch = step // STEPS + 1
        for group in optimizer.param_groups:
            assert group["momentum"] == 0.9 and group["nesterov"] is True and group["dampening"] == 0
            assert group["weight_decay"] == weight_decay
            if epoch in rates:
                assert group["lr"] == pytest.approx(rates[epoch], rel=1e-12), epoch
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("corpus", [*WEIGHT_DECAY, None])
@pytest.mark.parametrize("name", ["adapt", "cross_validate"])
def test_emotion_recipe(work, corpus, name):
    recipe = recipe_of(name, corpus)
    check_optimizer(work.model(recipe=recipe), recipe, EMOTION, WEIGHT_DECAY.get(corpus, 5e-3))
    assert recipe.per_device_train_batch_size == 32


@pytest.mark.parametrize("file", ["voxceleb2", None])
@pytest.mark.parametrize("adapters", ["--adapters", "--no-adapters"])
def test_speaker_recipe(file, adapters):
    pretrain = script("pretrain")
    recipe = recipe_of("pretrain", file)
    args, _ = parse_arguments(pretrain.Arguments, pretrain.PAPER, [adapters])
    model = pretrain.new_model(args, ["a", "b"])
    assert model.config.adapters is (adapters == "--adapters")
    check_optimizer(model, recipe, SPEAKER, 1e-4)
    assert recipe.per_device_train_batch_size == 64 and recipe.balance_classes


def test_everything_that_the_paper_leaves_out_is_off(work):
    for name, file in [("adapt", "iemocap"), ("adapt", None), ("pretrain", "voxceleb2")]:
        recipe = dataclasses.asdict(recipe_of(name, file))
        off = {"label_smoothing": 0, "mixup": 0, "random_crop": False, "freq_mask": 0, "time_mask": 0}
        off |= {"speed_perturbation": 0, "noise_snr": None, "channel_db": 0, "warmup_epochs": 0}
        assert {key: recipe[key] for key in off} == off


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_trains(work, method):
    model = work.model(method)
    groups = {group["part"]: group["params"] for group in make_optimizer(model, Recipe()).param_groups}
    assert set(groups) == PARTS[method]
    of_base = {p for name, p in model.named_parameters() if name.startswith("s2e.shared.")}
    assert ("shared" in groups) == all(p.requires_grad for p in of_base)
    assert ("shared" not in groups) == all(not p.requires_grad for p in of_base)
    if METHODS[method].makes_adapter:  # the speaker domain, which stays in the model, learns nothing
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names and all(".toy." in name for name in names)


def test_parts_may_have_rates_of_their_own(work):
    recipe = Recipe(alpha_learning_rate=0.1, fc_weight_decay=0.0, bn_learning_rate=0.02)
    groups = {g["part"]: g for g in make_optimizer(work.model(), recipe).param_groups}
    assert {part: g["lr"] for part, g in groups.items()} == {"alpha": 0.1, "bn": 0.02, "fc": 0.01}
    assert {part: g["weight_decay"] for part, g in groups.items()} == {"alpha": 5e-3, "bn": 5e-3, "fc": 0.0}


def test_cosine_schedule_with_warmup(work):
    recipe = Recipe(num_train_epochs=4, lr_scheduler_type="cosine", warmup_epochs=1)
    scheduler = make_scheduler(make_optimizer(work.model(), recipe), recipe, STEPS)
    rates = [scheduler.lr_lambdas[0](step) for step in range(4 * STEPS + 1)]
    assert rates[:STEPS] == pytest.approx([(i + 1) / STEPS for i in range(STEPS)])
    assert rates[STEPS] == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert rates[STEPS:] == sorted(rates[STEPS:], reverse=True)


def test_flags_go_before_the_file_and_the_file_before_the_script(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 3e-2\nlr_drop_epochs: [2, 4]\nbalance_classes: false\n")
    pretrain = script("pretrain")
    flags = ["--recipe", str(file), "--lr_drop_epochs", "5", "6"]
    recipe = parse_arguments(pretrain.Arguments, pretrain.PAPER, flags)[1]
    assert (recipe.learning_rate, recipe.lr_drop_epochs, recipe.balance_classes) == (0.03, [5, 6], False)
    assert recipe.weight_decay == 1e-4


@pytest.mark.parametrize(
    "content, said",
    [
        ("learning_rte: 0.1\n", "learning_rte"),
        ("lr_scheduler_type: linear\n", "linear"),
        ("[]", "settings"),
        ("a: [", "YAML"),
    ],
)
def test_a_recipe_that_cannot_be_meant(tmp_path, capsys, content, said):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        parse_arguments(script("adapt").Arguments, {}, ["--recipe", str(file)])
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown settings"):
        file.write_text("nonsense: 1\n")
        read_recipe(file)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("lr_drop_epochs: 11", "lr_drop_epochs is 11, but must be a list of epochs, whole numbers from 1"),
        ("lr_drop_epochs: [eleven]", "lr_drop_epochs is ['eleven'], but must be a list"),
        ("lr_drop_epochs: [0]", "lr_drop_epochs is [0], but must be a list"),
        ("num_train_epochs: 2.5", "num_train_epochs is 2.5, but must be a whole number, 1 or more"),
        ("num_train_epochs: 0", "num_train_epochs is 0, but must be a whole number, 1 or more"),
        ("num_train_epochs: true", "num_train_epochs is True, but must be a whole number"),
        ("learning_rate: null", "learning_rate is None, but must be a number, 0 or more"),
        ("learning_rate: [0.1]", "learning_rate is [0.1], but must be a number"),
        ("learning_rate: -0.1", "learning_rate is -0.1, but must be a number, 0 or more"),
        ("learning_rate: .nan", "learning_rate is nan, but must be a number"),
        ("alpha_learning_rate: [0.1]", "alpha_learning_rate is [0.1], but must be a number, 0 or more"),
        ("momentum: 1", "momentum is 1, but must be a number, between 0 and 1"),
        ("mixup: -2.0", "mixup is -2.0, but must be a number, 0 or more"),
        ("speed_perturbation: 1.0", "speed_perturbation is 1.0, but must be"),
        ("balance_classes: 3", "balance_classes is 3, but must be true or false"),
        ("noise_snr: [5]", "noise_snr is [5], but must be a number, of any size"),
        ("pooling: max", "pooling is 'max', but must be one of ('mean', 'mean_std')"),
        ("adapter_init: 3", "adapter_init is 3, but must be a name"),
        ("3: 4", "unknown settings ['3']"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named_in_one_line(tmp_path, capsys, setting, said):
    (tmp_path / "mine.yaml").write_text(setting)
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(RepoArguments, {}, ["--recipe", str(tmp_path / "mine.yaml")])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and said in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--mixup", "-2"], ["--learning_rate", "-1"], ["--num_train_epochs", "0"]])
def test_so_is_one_of_the_command_line(capsys, flags):
    with pytest.raises(SystemExit):
        parse_arguments(RepoArguments, {}, flags)
    errors = capsys.readouterr().err
    assert f"error: {flags[0][2:]} is {float(flags[1]):g}" in errors.replace(".0,", ",") and "usage" not in errors


def test_settings_that_are_left_out_or_whole_numbers_are_fine():
    settings = {"bn_weight_decay": None, "learning_rate": 1, "lr_drop_epochs": [], "noise_snr": -5}
    assert Recipe(**settings).learning_rate == 1
    parse_arguments(RepoArguments, {}, [])  # after which the fields' types are others
    assert Recipe(**settings) == Recipe(**settings, alpha_learning_rate=None)


# ---- methods and bases


@pytest.mark.parametrize("base", ["adapter", "plain"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "residual_adapter_source"])
def test_one_base_serves_all_methods(work, base, method):
    """What is trained is the same, and where nothing is drawn anew training begins with the base's function."""
    model = build_model(method, getattr(work, base), "toy", ["a", "b"], Recipe())
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(METHODS[method].parts)
    if method in ("feature_extractor", "fine_tune", "bn_only") or (method, base) == ("residual_adapter", "plain"):
        original = S2EForAudioClassification.from_pretrained(getattr(work, base))
        x = torch.rand(2, 20, 20)
        torch.testing.assert_close(model.eval()(x).embeddings, original(x).embeddings, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "plain"])
def test_a_method_without_the_base_it_needs_is_refused(work, method):
    with pytest.raises(ValueError, match="give --model_name_or_path"):
        build_model(method, None, "toy", ["a", "b"], Recipe())


def test_the_literal_reading_needs_a_base_with_adapters(work):
    with pytest.raises(ValueError, match="the base is a plain network: start from one that was trained with adapters"):
        build_model("residual_adapter_source", work.plain, "toy", ["a", "b"], Recipe())
    assert build_model("adapter_only", work.plain, "toy", ["a", "b"], Recipe()).s2e.domains["toy"].stages
    with pytest.raises(ValueError, match="adapter_init is 'source', but must be 'kaiming'"):
        build_model("adapter_only", work.plain, "toy", ["a", "b"], Recipe(adapter_init="source"))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "plain"])
def test_a_fused_base_is_refused(work, tmp_path, method):
    model = build_model("fine_tune", work.plain, "toy", ["a", "b"], Recipe())
    model.fuse().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fused"):
        build_model(method, str(tmp_path), "toy", ["a", "b"], Recipe())


@pytest.mark.parametrize("base", ["adapter", "plain", None])
def test_plain_takes_only_the_front_end_from_a_base(work, base):
    model = build_model("plain", getattr(work, base) if base else None, "toy", ["a", "b"], Recipe())
    assert not model.config.adapters and model.config.id2label == {0: "a", 1: "b"}
    assert model.config.num_bins == (20 if base else 400)


@pytest.mark.parametrize(
    "method, init", [("adapter_only", "zero"), ("bn_only", "zero"), ("residual_adapter_source", "kaiming")]
)
def test_alpha_cannot_start_just_anywhere(work, method, init):
    with pytest.raises(ValueError, match=f"adapter_init is '{init}', but must be 'source'"):
        build_model(method, work.adapter, "toy", ["a", "b"], Recipe(adapter_init=init))


def test_why_adapter_only_cannot_start_from_zero(work):
    with pytest.raises(ValueError, match="no gradient"):
        build_model("adapter_only", work.adapter, "toy", ["a", "b"], Recipe(adapter_init="zero"))


@pytest.mark.parametrize(
    "method, start",
    [("residual_adapter", 0), ("residual_adapter_source", 1), ("adapter_only", 1), ("bn_only", 1)],
)
def test_where_alpha_starts(work, method, start):
    model = work.model(method)
    new, source = (model.s2e.domains[name].state_dict() for name in ("toy", model.config.base_domain))
    for name in new:
        wanted = start * source[name] if ".alpha." in name else source[name]
        assert torch.equal(new[name], wanted), name


def test_the_recipes_that_compete():
    folder = SCRIPTS / "recipes" / "plus"
    recipes = {file.stem: Recipe(**read_recipe(file)) for file in folder.glob("*.yaml")}
    assert len(recipes) == 8 and len({str(recipe) for recipe in recipes.values()}) == 8
    assert recipes["paper"] == recipe_of("cross_validate", "emodb")
    listed = re.findall(r"^\| (\S+)\.yaml \|", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(recipes)


def test_the_short_recipes_that_compete_each_change_one_thing():
    short = dataclasses.asdict(Recipe(**read_recipe(SCRIPTS / "recipes" / "short.yaml")))
    changed = {
        file.stem: {
            key for key, value in dataclasses.asdict(Recipe(**read_recipe(file))).items() if value != short[key]
        }
        for file in (SCRIPTS / "recipes" / "short-plus").glob("*.yaml")
    }
    assert changed == {
        "alpha": {"alpha_learning_rate"},
        "voices": {"speed_perturbation", "channel_db"},
        "spread": {"pooling"},
    }


@pytest.mark.parametrize("name", ["short", "speakers-plus"])
def test_the_other_recipes_can_be_read(name):
    assert Recipe(**read_recipe(SCRIPTS / "recipes" / f"{name}.yaml")) != Recipe()


def test_numbers_as_python_writes_them(tmp_path):
    """YAML 1.1 takes 1e-3, without a point, for text."""
    file = tmp_path / "mine.yaml"
    file.write_text("weight_decay: 1e-3\nnoise_snr: 1e1\npooling: mean\n")
    assert read_recipe(file) == {"weight_decay": 0.001, "noise_snr": 10.0, "pooling": "mean"}
    assert script("cross_validate").name_of(Recipe(**read_recipe(file)), str(file)) == "mine"
    file.write_text("weight_decay: small\n")
    with pytest.raises(ValueError, match="weight_decay is 'small'"):
        Recipe(**read_recipe(file))


# ---- where the classifier and the statistics begin


def test_the_classifier_is_fitted_to_the_frozen_network_first(work):
    """As scikit-learn's logistic regression does it, on the segments' embeddings, standardised."""
    from sklearn.linear_model import LogisticRegression

    from hf_s2e.training.linear_probe import fit_head
    from hf_s2e.training.predict import run_segments

    recipe = Recipe(head="standardized", pooling="mean_std", head_start="probe", probe_l2=3.0)
    model = work.model("residual_adapter", recipe)
    task = work.task(model)
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("heads.toy.")}
    fit_head(model, task, recipe, torch.device("cpu"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    embeddings = run_segments(model, task, device=torch.device("cpu"), output="embeddings")
    labels = [task.labels[row] for row, one in zip(task.utterances, embeddings) for _ in one]
    x = torch.cat(embeddings)
    x = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).numpy()
    reference = LogisticRegression(C=1 / 3.0, tol=1e-6, max_iter=1000).fit(x, labels)
    head = model.heads["toy"]
    ours = torch.from_numpy(x) @ head.weight.detach().T + head.bias.detach()
    expected = torch.from_numpy(reference.predict_log_proba(x)).float()
    torch.testing.assert_close(ours.log_softmax(1), expected, atol=0.02, rtol=0)
    assert model.heads["toy"].weight.grad is None and not model.train().heads["toy"].norm.training


def test_a_training_may_begin_with_a_fitted_classifier(work):
    recipe = {"head": "standardized", "num_train_epochs": 1, "per_device_train_batch_size": 5, "learning_rate": 1e-6}
    _, random = work.train("feature_extractor", Recipe(**recipe))
    _, fitted = work.train("feature_extractor", Recipe(**recipe, head_start="probe", probe_l2=0.1))
    assert fitted[0]["loss"] < 0.95 * random[0]["loss"]


def test_batch_norms_may_keep_the_statistics_of_their_source(work):
    recipe = {"num_train_epochs": 1, "per_device_train_batch_size": 5}
    for how, kept in (("source", True), ("batch", False)):
        model = work.model("residual_adapter", Recipe(**recipe, bn_statistics=how))
        before = {n: t.clone() for n, t in model.state_dict().items() if "domains.toy" in n}
        model, _ = work.train("residual_adapter", Recipe(**recipe, bn_statistics=how), model=model)
        after = model.state_dict()
        means = [name for name in before if name.endswith("running_mean")]
        assert all(torch.equal(before[name], after[name]) is kept for name in means)
        assert not torch.equal(
            before[means[0].replace("running_mean", "weight")], after[means[0].replace("running_mean", "weight")]
        )
