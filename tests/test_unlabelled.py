"""Tasks from images without labels: what augmentations change, what a task holds, and that no label is read."""

import sys

import pytest
import torch
from torch import nn

from fastmeta.tasks import (
    Augmentation,
    AugmentedTasks,
    ClusterTasks,
    embed_images,
    glyphs,
    kmeans_partitions,
)
from fastmeta.tasks.augment import HANDWRITING
from fastmeta.tasks.drawing import subsets
from fastmeta.training import CheckpointError, RunConfig, run_config
from fastmeta.training.run import build_training_tasks

pytestmark = pytest.mark.usefixtures("few_glyphs")

EACH = {
    "rotate": 20.0, "scale": 0.3, "shift": 0.1, "shear": 0.3, "crop": 0.3, "elastic": 0.05, "thicken": 0.9, "drop": 0.2,
    "brightness": 0.4, "contrast": 0.4,
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return glyphs("train")


def numbered(count, side=6):
    """Image i is grey `i / 255` all over, so that it can be told from its pixels."""
    return torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, side, side).contiguous()


def number(x):
    return (x[..., 0, 0, 0] * 255).round().long()


# ----- augmentation


@pytest.mark.parametrize("name", EACH)
def test_every_image_has_random_numbers_of_its_own(images, name):
    same = images[0, :1].expand(32, -1, -1, -1)
    augmentation = Augmentation(**{name: EACH[name]})
    changed = augmentation(same, generator())
    assert changed.shape == same.shape and changed.dtype == torch.float32
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
    assert len(changed.flatten(1).unique(dim=0)) == 32
    assert torch.equal(changed, augmentation(same, generator()))
    assert not torch.equal(changed, augmentation(same, generator(1)))
    # the same thing is still there: far nearer to its own image than a class is to another
    original, other = same[0].float() / 255, images[1, 0].float() / 255
    assert (changed - original).square().mean() < (original - other).square().mean()


def test_nothing_is_changed_by_zeros(images):
    flat = images.flatten(0, 1)
    assert torch.equal(Augmentation()(flat), flat.float() / 255)
    floating = torch.rand(3, 2, 5, 7, dtype=torch.float64)
    assert Augmentation()(floating) is floating
    # the map of coordinates too, when only one of its changes is left at almost nothing
    torch.testing.assert_close(Augmentation(shift=1e-9)(floating), floating, rtol=0, atol=1e-6)


def test_geometry():
    """A bright pixel goes where the largest change can take it, and no farther."""
    image = torch.zeros(400, 1, 21, 21)
    image[:, :, 10, 10] = 1

    def spread(**changes):
        where = Augmentation(**changes)(image, generator()).amax((0, 1)).nonzero()
        return (where - 10).abs().amax(0).tolist()

    assert max(spread(rotate=90)) <= 1  # about the middle
    assert spread(shift=0.2) == [5, 5]  # 4.2 pixels either way, interpolated
    image.zero_()
    image[:, :, 10, 18] = 1
    assert all(8 <= far <= 9 for far in spread(rotate=90))
    assert spread(shear=0.5)[1] <= 9 and spread(shear=0.5)[0] <= 1  # along x, and this pixel lies on the axis
    image.zero_()
    image[:, :, 18, 10] = 1
    assert 4 <= spread(shear=0.5)[1] <= 5 and spread(shear=0.5)[0] <= 9
    enlarged = Augmentation(crop=0.5)(torch.ones(50, 1, 8, 8), generator())
    torch.testing.assert_close(enlarged[..., 1:-1, 1:-1], torch.ones(50, 1, 6, 6))  # the window lies inside
    image = torch.zeros(300, 1, 8, 32)
    image[:, :, 4, 28] = 1
    rows = Augmentation(rotate=10)(image, generator()).amax((0, 1)).nonzero()[:, 0]
    assert rows.min() <= 2 and rows.max() >= 6  # 12 pixels from the middle, turned by 10 degrees, moves 2


def test_elastic_is_smooth():
    ramp = torch.linspace(0, 1, 28).expand(64, 1, 28, 28)
    moved = (Augmentation(elastic=0.03)(ramp, generator()) - ramp)[..., 4:-4, 4:-4]
    assert 0.015 < moved.std() < 0.045
    assert (moved[..., 1:, :] - moved[..., :-1, :]).abs().mean() < 0.25 * moved.abs().mean()


def test_mirrored_images():
    x = torch.rand(400, 3, 4, 5)
    flipped = Augmentation(flip=0.3)(x, generator())
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored]) and 0.2 < mirrored.float().mean() < 0.4
    assert torch.equal(Augmentation(flip=1.0)(x), x.flip(-1))


def test_colours():
    """Each of the three is one number of an image, the same in all its pixels and channels."""
    x = 0.3 + 0.2 * torch.rand(300, 3, 4, 5, dtype=torch.float64)
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    centres = {"brightness": 0 * x, "contrast": luma.mean((2, 3), keepdim=True).expand_as(x), "saturation": luma}
    for name, centre in centres.items():
        changed = Augmentation(**{name: 0.4})(x, generator())
        factor = ((changed - centre) / (x - centre)).flatten(1)
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-6)
        assert 0.6 <= factor.min() < 0.62 and 1.38 < factor.max() < 1.4 and abs(factor.mean() - 1) < 0.04
        far = ((Augmentation(**{name: 3.0})(x, generator()) - centre) / (x - centre)).flatten(1)
        assert far.min() > -1e-9  # no negative of an image
    bright = Augmentation(brightness=1.0, contrast=1.0, saturation=1.0)(torch.rand(200, 3, 4, 4), generator())
    assert bright.min() == 0 and bright.max() == 1
    grey = torch.rand(9, 1, 4, 4)
    assert torch.equal(Augmentation(saturation=0.5)(grey), grey)
    many = torch.rand(9, 5, 4, 4)
    washed = Augmentation(saturation=0.5)(many, generator())
    torch.testing.assert_close(washed.mean(1), many.mean(1), rtol=0, atol=0.2)
    assert not torch.equal(washed, many)


def test_pen_and_dropped_pixels(images):
    same = images[0, :1].expand(64, -1, -1, -1)
    ink = Augmentation(thicken=1.0)(same, generator()).sum((1, 2, 3)) / (same[0].sum() / 255)
    assert ink.min() < 0.8 and ink.max() > 1.2
    dropped = Augmentation(drop=0.3)(torch.ones(20, 3, 28, 28), generator())
    assert 0.28 < (dropped == 0).float().mean() < 0.32
    assert torch.equal(dropped[:, 0], dropped[:, 2])


def test_augmentation_arguments_are_checked():
    with pytest.raises(ValueError, match="rotate"):
        Augmentation(rotate=-1)
    with pytest.raises(ValueError, match="drop.*below 1"):
        Augmentation(drop=1.0)
    with pytest.raises(ValueError, match="thicken"):
        Augmentation(thicken=2)
    with pytest.raises(TypeError, match="shift"):
        Augmentation(shift="far")
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        Augmentation(rotate=3)(torch.zeros(3, 28, 28))
    assert HANDWRITING(torch.zeros(0, 1, 28, 28)).shape == (0, 1, 28, 28)


# ----- augmented tasks


def brighter(x, generator=None):
    """An augmentation that can be told: half a grey level, at random which."""
    return x + (0.1 + 0.3 * torch.rand(len(x), 1, 1, 1, generator=generator)) / 255


@pytest.mark.parametrize("augment_support", [False, True])
@pytest.mark.parametrize("shots", [1, 2])
def test_queries_are_augmentations_of_the_support_images(shots, augment_support):
    sizes = {"ways": 5, "shots": shots, "query_shots": 3}
    tasks = AugmentedTasks(numbered(40), augmentation=brighter, augment_support=augment_support, **sizes)
    batch = tasks.sample(200, generator=generator())
    assert batch.support_x.shape == (200, 5 * shots, 1, 6, 6) and batch.query_x.shape == (200, 15, 1, 6, 6)
    assert batch.support_x.dtype == torch.float32 and batch.support_y.dtype == torch.int64
    assert batch.support_y.tolist() == [torch.arange(5).repeat_interleave(shots).tolist()] * 200
    assert batch.query_y.tolist() == [torch.arange(5).repeat_interleave(3).tolist()] * 200
    support, query = number(batch.support_x), number(batch.query_x)
    first = support[:, ::shots]
    assert torch.equal(support, first.repeat_interleave(shots, 1))
    assert torch.equal(query, first.repeat_interleave(3, 1))
    assert all(len(set(row)) == 5 for row in first.tolist()) and len(first.unique()) == 40
    untouched = batch.support_x.flatten(2)[..., 0] * 255 == support
    assert untouched[:, ::shots].all() if not augment_support else not untouched.any()
    if shots == 2:
        assert not untouched[:, 1::2].any()
    values = batch.query_x[..., 0, 0, 0]
    assert len(values.unique()) > 0.99 * values.numel()  # every view its own
    assert (tasks.kind, tasks.input_shape, tasks.output_size) == ("classification", (1, 6, 6), 5)


def test_same_generator_same_tasks(images):
    tasks = AugmentedTasks(images, ways=4, query_shots=2)
    one, two, three = (tasks.sample(3, generator=generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.query_x, three.query_x)


def test_no_label_is_read():
    """Images of one class are as different as any two, and shuffled classes are the same images."""
    plain = numbered(24).unflatten(0, (4, 6))  # [classes, instances, ...]
    order = torch.randperm(24, generator=generator())
    shuffled = plain.flatten(0, 1)[order].unflatten(0, (4, 6))
    sizes = {"ways": 24, "augmentation": brighter}
    for tasks in (AugmentedTasks(plain, **sizes), AugmentedTasks(shuffled, **sizes)):
        assert sorted(number(tasks.sample(1).support_x)[0].tolist()) == list(range(24))
    pairs = number(AugmentedTasks(plain, ways=2, augmentation=brighter).sample(3000, generator=generator()).support_x)
    same_class = (pairs[:, 0] // 6 == pairs[:, 1] // 6).float().mean()
    assert abs(same_class - 5 / 23) < 0.03


def test_rotations_are_other_images(images):
    tasks = AugmentedTasks(images[:, :1], ways=24, rotations=True, augmentation=Augmentation())
    batch = tasks.sample(1, generator=generator())
    turned = torch.cat([torch.rot90(images[:, 0], turns, (-2, -1)) for turns in range(4)]).float() / 255
    found = {row.numpy().tobytes() for row in batch.support_x[0]}
    assert found == {row.contiguous().numpy().tobytes() for row in turned} and len(found) == 24
    assert torch.equal(batch.support_x, batch.query_x)


def test_augmented_arguments_are_checked(images):
    with pytest.raises(ValueError, match="ways must be at most 120, the images of letters"):
        AugmentedTasks(images, ways=121, name="letters")
    with pytest.raises(ValueError, match="query_shots"):
        AugmentedTasks(images, ways=5, query_shots=0)
    with pytest.raises(ValueError, match="C, H, W"):
        AugmentedTasks(torch.zeros(3, 28, 28), ways=2)


# ----- clusters


def test_examples_of_a_class_share_a_cluster():
    # image i is in cluster i % 7 of the first partition, i // 10 of the second
    index = torch.arange(90)
    partitions = torch.stack([index % 7, index // 10])
    tasks = ClusterTasks(numbered(90), partitions, ways=4, shots=2, query_shots=3)
    batch = tasks.sample(500, generator=generator())
    support, query = number(batch.support_x).view(500, 4, 2), number(batch.query_x).view(500, 4, 3)
    assert torch.equal(batch.support_y[0], torch.arange(4).repeat_interleave(2))
    assert torch.equal(batch.query_y[0], torch.arange(4).repeat_interleave(3))
    rows = torch.cat([support, query], 2)
    assert all(len(set(row)) == 5 for row in rows.flatten(0, 1).tolist())  # support and query are disjoint
    by = [torch.stack([p[row] for row in rows]) for p in partitions]
    whole = [(b == b[..., :1]).all(-1).all(-1) & (b[:, :, 0].sort(1)[0].diff() > 0).all(1) for b in by]
    assert (whole[0] | whole[1]).all()  # every task is of one partition, its clusters differ
    assert 0.4 < whole[0].float().mean() < 0.6
    assert len(rows.unique()) == 90


def test_small_clusters_and_images_without_one_are_dropped():
    sizes = [1, 3, 4, 9, 2, 5]
    partition = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)] + [torch.full((6,), -1)])
    shuffle = torch.randperm(30, generator=generator())
    partition = partition[shuffle]
    tasks = ClusterTasks(numbered(30), partition, ways=3, shots=1, query_shots=3)
    drawn = number(tasks.sample(300, generator=generator()).support_x)
    assert set(partition[drawn].unique().tolist()) == {2, 3, 5}
    assert set(drawn.unique().tolist()) == {i for i in range(30) if partition[i] in (2, 3, 5)}
    with pytest.raises(ValueError, match=r"ways must be at most 3, the clusters of letters.*= 4 images, got 4"):
        ClusterTasks(numbered(30), partition, ways=4, shots=1, query_shots=3, name="letters")


def test_clusters_turn_as_a_whole(images):
    partition = torch.arange(6).repeat_interleave(20)
    tasks = ClusterTasks(images, partition, ways=24, shots=1, query_shots=2, rotations=True)
    batch = tasks.sample(2, generator=generator())
    turned = [(torch.rot90(images.flatten(0, 1), turns, (-2, -1)).float() / 255).contiguous() for turns in range(4)]
    where = {
        row.numpy().tobytes(): (turn, int(cluster))
        for turn, part in enumerate(turned)
        for row, cluster in zip(part, partition, strict=True)
    }
    for task in range(2):
        support = [where[row.numpy().tobytes()] for row in batch.support_x[task]]
        query = [where[row.numpy().tobytes()] for row in batch.query_x[task]]
        assert len(set(support)) == 24 and query == [key for key in support for _ in range(2)]


def test_ragged_subsets_are_uniform():
    population = torch.tensor([2, 3, 5]).repeat(4000)
    rows = subsets(len(population), population, 2, device="cpu", generator=generator())
    assert (rows[:, 0] != rows[:, 1]).all() and (rows < population.unsqueeze(1)).all() and (rows >= 0).all()
    for size in (2, 3, 5):
        pairs = rows[population == size]
        counts = torch.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size).float() / len(pairs)
        expected = (1 - torch.eye(size)).flatten() / (size * (size - 1))
        assert (counts - expected).abs().max() < 0.03


def test_kmeans_finds_clusters_and_partitions_differ():
    pytest.importorskip("sklearn")
    centres = torch.randn(8, 10, generator=generator()) * 5
    truth = torch.arange(8).repeat(25)
    points = centres[truth] + 0.3 * torch.randn(200, 10, generator=generator(1))
    partitions = kmeans_partitions(points, 8, 3)
    assert partitions.shape == (3, 200) and partitions.dtype == torch.int64 and partitions.max() < 8
    for partition in partitions:  # clusters so far apart survive any scaling, if points and means have the same
        assert len((truth * 8 + partition).unique()) == 8  # the same partition, by other names
    assert torch.equal(partitions, kmeans_partitions(points, 8, 3))
    noise = torch.randn(200, 10, generator=generator(2))
    one, two = kmeans_partitions(noise, 20, 2)
    assert len((one * 20 + two).unique()) > 40
    with pytest.raises(ValueError, match="M >= clusters"):
        kmeans_partitions(points[:5], 8)
    with pytest.raises(ValueError, match="finite"):
        kmeans_partitions(points / 0, 8)
    with pytest.raises(ValueError, match="partitions"):
        kmeans_partitions(points, 8, 0)


def test_partitions_after_the_first_are_of_scaled_dimensions(monkeypatch):
    """Each dimension by a number of its own from N(0, 1), in each partition by others."""
    cluster = pytest.importorskip("sklearn.cluster")
    seen = []

    class Recorded(cluster.MiniBatchKMeans):
        def fit(self, points, *rest, **named):
            seen.append(torch.from_numpy(points))
            return super().fit(points, *rest, **named)

    monkeypatch.setattr(cluster, "MiniBatchKMeans", Recorded)
    points = torch.rand(4, 3000, generator=generator()) + 1
    kmeans_partitions(points, 2, 3, seed=1)
    assert len(seen) == 3 and torch.equal(seen[0], points)
    factors = [scaled / points for scaled in seen[1:]]
    for factor in factors:
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))  # the same for all points
        assert abs(factor[0].mean()) < 0.1 and abs(factor[0].std() - 1) < 0.1
        assert 0.65 < (factor[0].abs() < 1).float().mean() < 0.72  # 0.683 of a normal distribution
    assert abs(torch.corrcoef(torch.stack([factor[0] for factor in factors]))[0, 1]) < 0.1


def test_scaling_decides_what_is_clustered():
    """The corners of a rectangle in two clusters: as they are by its long side, scaled by either."""
    pytest.importorskip("sklearn")
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.5], [1.0, 0.0], [1.0, 1.5]]).repeat(10, 1)
    first, *others = kmeans_partitions(corners, 2, 20)
    by_x, by_y = corners[:, 0] > 0, corners[:, 1] > 0
    found = [[bool(((p == p[0]) == (side == side[0])).all()) for side in (by_x, by_y)] for p in (first, *others)]
    assert found[0] == [False, True]
    assert {tuple(f) for f in found[1:]} == {(True, False), (False, True)}


def test_clusters_without_scikit_learn_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        kmeans_partitions(torch.randn(9, 3), 2)


def test_cluster_arguments_are_checked():
    with pytest.raises(ValueError, match=r"\[P, M\].*M = 9"):
        ClusterTasks(numbered(9), torch.zeros(8, dtype=torch.int64), ways=1)
    with pytest.raises(TypeError, match="int64"):
        ClusterTasks(numbered(9), torch.zeros(9), ways=1)


def test_embeddings_are_of_eval_mode(images):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    embeddings = embed_images(encoder, images)
    assert embeddings.shape == (120, 4) and encoder.training and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, encoder.eval()(images.flatten(0, 1).float() / 255))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


# ----- runs


def config(algorithm="protonet", data="glyphs", **given):
    small = {"iterations": 3, "eval_every": 0, "hidden": (8,), "train_ways": 5, "ways": 5, "eval_tasks": 4}
    return run_config(algorithm, data, **{**small, **given})


def test_settings_survive_json_and_know_their_source():
    made = config(labels="augment", augmentation=(("rotate", 5.0), ("elastic", 0)))
    assert RunConfig.from_json(made.as_json()) == made
    assert made.augment() == Augmentation(**{**vars(HANDWRITING), "rotate": 5.0, "elastic": 0})
    assert not made.augment_support and config("contrastive").augment_support
    assert config("contrastive").labels == "augment" and config().labels == "true"
    plain = config("contrastive", labels="true")
    assert plain.augmentation == () and not plain.augment_support
    before = {name: value for name, value in made.as_json().items() if "augment" not in name and name != "labels"}
    assert RunConfig.from_json(before).labels == "true"  # a checkpoint of before


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"labels": "guess"}, "labels must be one of true, augment, cluster"),
        ({"algorithm": "maml", "data": "sinusoid", "labels": "augment"}, "'augment' needs images"),
        ({"augmentation": (("rotate", 3),)}, "of labels 'augment'"),
        ({"cluster_checkpoint": "here"}, "of labels 'cluster'"),
        ({"labels": "augment", "augmentation": (("blur", 3),)}, "augmentation has rotate.*'blur'"),
        ({"labels": "augment", "augmentation": (("drop", 3),)}, "drop must be below 1"),
        ({"labels": "cluster", "clusters": 0}, "clusters must be at least 1"),
        ({"algorithm": "contrastive", "train_query_shots": 2}, "train_query_shots must be 1 for contrastive"),
    ],
)
def test_settings_that_do_not_fit(given, text):
    given = {"algorithm": "protonet", "data": "glyphs", **given}
    with pytest.raises(ValueError, match=text):
        run_config(given.pop("algorithm"), given.pop("data"), iterations=3, **given)


def test_training_tasks_of_each_kind():
    cpu = torch.device("cpu")
    made = build_training_tasks(config(labels="augment", augmentation=(("rotate", 0),), train_ways=480), cpu)
    assert isinstance(made, AugmentedTasks) and len(made.images) == 4 * 120 and made.augmentation.rotate == 0
    pytest.importorskip("sklearn")
    made = build_training_tasks(config(labels="cluster", clusters=5, cluster_partitions=2, train_query_shots=1), cpu)
    assert isinstance(made, ClusterTasks)
    assert made.sample(2).support_x.shape == (2, 5, 1, 28, 28)
    with pytest.raises(CheckpointError, match="nowhere"):
        build_training_tasks(config(labels="cluster", cluster_checkpoint="nowhere"), cpu)


@pytest.fixture
def run(run):
    """Both streams as one text."""
    return lambda *arguments, **options: "".join(run(*arguments, **options))


def test_the_way_from_contrast_to_clusters(tmp_path, run):
    pytest.importorskip("sklearn")
    small = ["--data", "glyphs", "--hidden", 8, "--eval-tasks", 4, "--threads", 1, "--ways", 4]
    first, second = tmp_path / "contrast", tmp_path / "clusters"
    run(
        "train", "contrastive", *small, "--iterations", 4, "--train-ways", 8, "--out", first, "--augment", "rotate=5",
        "--set", "temperature=0.2",
    )  # fmt: skip
    text = run("train", "contrastive", "--out", first, "--resume", "--iterations", 6, "--augment", "rotate=5")
    assert "resumed" in text and "finished at step 6" in text
    text = run("train", "contrastive", "--out", first, "--resume", "--iterations", 7, "--augment", "rotate=6", code=2)
    assert "--resume cannot change augmentation" in text
    assert "accuracy" in run("evaluate", first, "--episodes", 5, "--threads", 1, "--newest")

    clusters = ["--labels", "cluster", "--cluster-checkpoint", first, "--clusters", 6, "--train-ways", 4]
    few = ["--train-query-shots", 1, "--iterations", 2, "--task-batch", 2]
    run("train", "maml", *small, *clusters, *few, "--out", second)
    text = run("train", "maml", "--out", second, "--resume", "--iterations", 3)
    assert "finished at step 3" in text
    text = run(
        "train", "protonet", *small, "--labels", "cluster", "--cluster-checkpoint", second, "--iterations", 1,
        "--out", tmp_path / "third", code=2,
    )  # fmt: skip
    assert "an encoder, got one of maml" in text


def test_resuming_goes_the_same_way(tmp_path, run):
    small = ["train", "contrastive", "--data", "glyphs", "--hidden", 8, "--train-ways", 8, "--eval-every", 0]
    small += ["--threads", 1, "--out"]
    run(*small, tmp_path / "whole", "--iterations", 6)
    run(*small, tmp_path / "parts", "--iterations", 3)
    run("train", "contrastive", "--out", tmp_path / "parts", "--resume", "--iterations", 6)
    whole, parts = (tmp_path / name / "step-00000006.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
