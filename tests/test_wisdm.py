"""Windows of people's accelerometers, and tasks of one person each."""

import pytest
import torch
from conftest import DEVICE

from fastmeta.algorithms import MAML
from fastmeta.nn import conv4_1d
from fastmeta.tasks import PersonTasks, wisdm
from fastmeta.tasks.wisdm import FILE


def numbered():
    """Three people, of whom the first does too little; each window says who does what, and which it is."""
    counts = {(1, 0): 9, (1, 2): 2, (2, 0): 3, (2, 1): 4, (2, 2): 5, (2, 3): 2, (7, 1): 6, (7, 3): 3}
    rows = [(p, a, i) for (p, a), count in counts.items() for i in range(count)]
    rows = torch.tensor(rows, device=DEVICE)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows.float().unsqueeze(1), rows[:, 1], rows[:, 0]


def test_tasks_are_of_one_person_and_of_windows_that_differ():
    tasks = PersonTasks(*numbered(), ways=2, shots=1, query_shots=2)
    assert tasks.input_shape == (1, 3) and tasks.output_size == 2 and tasks.kind == "classification"
    batch = tasks.sample(600, generator=torch.Generator(DEVICE).manual_seed(0))
    assert batch.support_x.shape == (600, 2, 1, 3) and batch.query_x.shape == (600, 4, 1, 3)
    assert batch.support_y[0].tolist() == [0, 1] and batch.query_y[5].tolist() == [0, 0, 1, 1]
    x = torch.cat([batch.support_x, batch.query_x], 1)[:, :, 0].long()
    labels = torch.cat([batch.support_y, batch.query_y], 1)
    assert (x[:, :, 0] == x[:, :1, 0]).all()
    first = x[:, :2, 1].gather(1, labels)  # the activity that stands for each row's label
    assert (x[:, :, 1] == first).all() and (x[:, 0, 1] != x[:, 1, 1]).all()
    assert all(len({tuple(row) for row in task}) == 6 for task in x.tolist())
    found = {(task[0][0], task[0][1], task[1][1]) for task in x.tolist()}
    of_second = {(2, a, b) for a in (0, 1, 2) for b in (0, 1, 2) if a != b}  # it has two windows of the last only
    assert found == of_second | {(7, 1, 3), (7, 3, 1)}
    every = {tuple(row) for row in x.flatten(0, 1).tolist()}
    assert len(every) == 3 + 4 + 5 + 6 + 3
    again = tasks.sample(600, generator=torch.Generator(DEVICE).manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True)) and tasks.sample(0).num_tasks == 0


def test_what_is_refused(tmp_path):
    x, activity, person = numbered()
    with pytest.raises(ValueError, match=r"no task .no person. has 4 classes with 1 \+ 2 rows each: ask for fewer"):
        PersonTasks(x, activity, person, ways=4, query_shots=2)
    with pytest.raises(ValueError, match="must have as many rows"):
        PersonTasks(x, activity[1:], person)
    with pytest.raises(ValueError, match="ways must be at least 1"):
        PersonTasks(x, activity, person, ways=0)
    with pytest.raises(ValueError, match=f"no WISDM in .*{FILE}"):
        wisdm(data_root=tmp_path)
    (tmp_path / FILE).write_text("@relation\n@data\n1,33,0.1,Walking\n")
    with pytest.raises(ValueError, match="is damaged: rows must have 46 columns"):
        wisdm(data_root=tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        wisdm("everybody", tmp_path)


def test_real_windows(data_root):
    windows = wisdm(data_root=data_root)
    assert windows.x.shape == (5418, 3, 10) and windows.x.dtype == torch.float32
    assert windows.activity.bincount().tolist() == [2081, 1625, 632, 528, 306, 246]
    assert 0.9 < windows.x.sum(2).median() < 1.1  # shares of what is read along an axis
    parts = [wisdm(split, data_root) for split in ("train", "val", "test")]
    assert [len(part.person.unique()) for part in parts] == [24, 6, 6]
    assert sum(len(part.x) for part in parts) == 5418


def test_maml_adapts_to_people_it_has_not_seen(data_root):
    torch.manual_seed(0)
    train, test = (PersonTasks(*wisdm(split, data_root), ways=3, shots=5) for split in ("train", "test"))
    net = conv4_1d(3, 8, kernel_size=3, num_classes=3, track_running_stats=False)
    maml = MAML(net, inner_lr=0.4, inner_steps=1)
    outer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(1)
    held_out = test.sample(100, generator=torch.Generator().manual_seed(2))

    def accuracy():
        with torch.no_grad():
            return maml(held_out).accuracy.mean().item()

    before = accuracy()
    for _ in range(20):
        outer.zero_grad()
        maml(train.sample(8, generator=drawn)).loss.backward()
        outer.step()
    assert 1 / 3 < before and accuracy() > before + 0.03  # from 0.47 to 0.55 where this was written
