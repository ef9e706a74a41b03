"""A right call of every public function, and wrong ones: the arguments that change, the error, its text."""

import torch
from conftest import DEVICE

T, S, Q, N, D = 2, 5, 4, 3, 6
META = "{} must be on the CPU or a CUDA device, got meta"
FLOATING = "{} must be float32, float64, float16 or bfloat16, got {}"
METRIC = "metric must be one of sqeuclidean, euclidean, cosine, dot, manhattan; got {!r}"
COUNT = [
    ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
    ({"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
    ({"num_classes": 3.0}, TypeError, "num_classes must be an int, got float"),
    ({"num_classes": None}, TypeError, "num_classes must be an int, got NoneType"),
]


def x(*shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


def labels(*shape, value=0, dtype=torch.int64, device=DEVICE):
    out = torch.zeros(shape, dtype=dtype, device=device)
    if value:
        out[-1, -1] = value
    return out


def of_tensor(name, layout, shape):
    """What is wrong with any floating tensor argument."""
    return [
        ({name: [[1.0]]}, TypeError, f"{name} must be a tensor of shape {layout}, got list"),
        ({name: None}, TypeError, f"{name} must be a tensor of shape {layout}, got NoneType"),
        ({name: x(*shape[:2])}, ValueError, f"{name} must have shape {layout}, got {list(shape[:2])}"),
        ({name: x(1, *shape)}, ValueError, f"{name} must have shape {layout}, got {[1, *shape]}"),
        ({name: x(*shape, dtype=torch.int64)}, TypeError, FLOATING.format(name, "int64")),
        ({name: x(*shape, dtype=torch.complex64)}, TypeError, FLOATING.format(name, "complex64")),
        ({name: x(*shape, device="meta")}, ValueError, META.format(name)),
    ]


def of_labels(name, layout, shape, like):
    wide, shape = [shape[0], shape[1] + 1], list(shape)
    match = f"{name} must have shape {layout} = {shape} to match {like}, got "
    in_range = f"{name} must lie in [0, num_classes) = [0, {N}), got "
    return [
        ({name: [0, 1]}, TypeError, f"{name} must be an int64 tensor of shape {layout}, got list"),
        ({name: labels(*shape, dtype=torch.int32)}, TypeError, f"{name} must be int64, got int32"),
        ({name: x(*shape)}, TypeError, f"{name} must be int64, got float32"),
        ({name: labels(shape[1])}, ValueError, f"{match}{shape[1:]}"),
        ({name: labels(*wide)}, ValueError, f"{match}{wide}"),
        (
            {name: labels(*shape, device="meta")},
            ValueError,
            f"{name} is on meta, but {like} is on {x().device}: they must",
        ),
        ({name: labels(*shape, value=N)}, ValueError, f"{in_range}{N}"),
        ({name: labels(*shape, value=2**40)}, ValueError, f"{in_range}{2**40}"),
        ({name: labels(*shape, value=-1)}, ValueError, f"{in_range}-1"),
    ]


RIGHT = {
    "class_prototypes": lambda: {"embeddings": x(T, S, D), "labels": labels(T, S), "num_classes": N},
    "pairwise_distance": lambda: {"query": x(T, Q, D), "prototypes": x(T, N, D)},
    "prototypical_loss": lambda: {
        "support": x(T, S, D),
        "support_labels": labels(T, S),
        "query": x(T, Q, D),
        "query_labels": labels(T, Q),
        "num_classes": N,
    },
    "contrastive_loss": lambda: {"first": x(T, S, D), "second": x(T, S, D), "temperature": 0.5},
    "functional_mlp": lambda: {
        "x": x(T, S, D),
        "weights": [x(4, D), x(T, 3, 4)],
        "biases": [x(T, 4), x(3)],
    },
    "norm_act_pool": lambda: {"x": x(T, 3, 4, 6, 5), "weight": x(T, 4), "bias": x(1, 4)},
    "task_conv1d": lambda: {"x": x(T, 3, 4, 6), "weight": x(T, 5, 4, 3), "bias": x(1, 5)},
    "task_conv2d": lambda: {"x": x(T, 3, 4, 6, 5), "weight": x(T, 5, 4, 3, 2), "bias": x(1, 5)},
    "fast_weight_update": lambda: {
        "params": {"w": x(4, 3), "b": x(4)},
        "grads": {"w": x(T, 4, 3), "b": x(T, 4)},
        "lr": 0.1,
    },
}
# for each function: the arguments that are wrong, the error, a piece of its text
WRONG = {
    "class_prototypes": [
        *of_tensor("embeddings", "[T, S, D]", (T, S, D)),
        *of_labels("labels", "[T, S]", (T, S), "embeddings"),
        *COUNT,
        ({"num_classes": 0}, ValueError, "labels must lie in [0, num_classes) = [0, 0), got 0"),
    ],
    "pairwise_distance": [
        *of_tensor("query", "[T, Q, D]", (T, Q, D)),
        *of_tensor("prototypes", "[T, N, D]", (T, N, D)),
        ({"prototypes": x(3, N, D)}, ValueError, "prototypes has T = 3 (shape [3, 3, 6]), but query has 2"),
        ({"prototypes": x(1, N, D)}, ValueError, "prototypes has T = 1 (shape [1, 3, 6]), but query has 2"),
        ({"prototypes": x(T, N, 5)}, ValueError, "prototypes has D = 5 (shape [2, 3, 5]), but query has 6"),
        (
            {"prototypes": x(T, N, D, dtype=torch.float64)},
            TypeError,
            "prototypes is float64, but query is float32: they must agree",
        ),
        ({"metric": "l2"}, ValueError, METRIC.format("l2")),
        ({"metric": None}, ValueError, METRIC.format(None)),
        ({"metric": 0}, ValueError, METRIC.format(0)),
    ],
    "prototypical_loss": [
        *of_tensor("support", "[T, S, D]", (T, S, D)),
        *of_tensor("query", "[T, Q, D]", (T, Q, D)),
        *of_labels("support_labels", "[T, S]", (T, S), "support"),
        *of_labels("query_labels", "[T, Q]", (T, Q), "query"),
        *COUNT,
        ({"num_classes": 0}, ValueError, "support_labels must lie in [0, num_classes) = [0, 0), got 0"),
        ({"query": x(3, Q, D)}, ValueError, "query has T = 3 (shape [3, 4, 6]), but support has 2"),
        ({"query": x(T, Q, 1)}, ValueError, "query has D = 1 (shape [2, 4, 1]), but support has 6"),
        (
            {"query": x(T, Q, D, dtype=torch.float16)},
            TypeError,
            "query is float16, but support is float32: they must agree",
        ),
        ({"metric": "Euclidean"}, ValueError, METRIC.format("Euclidean")),
    ],
    "contrastive_loss": [
        *of_tensor("first", "[T, B, D]", (T, S, D)),
        *of_tensor("second", "[T, B, D]", (T, S, D)),
        ({"second": x(3, S, D)}, ValueError, f"second has T = 3 (shape [3, {S}, {D}]), but first has {T}"),
        ({"second": x(T, 1, D)}, ValueError, f"second has B = 1 (shape [{T}, 1, {D}]), but first has {S}"),
        ({"second": x(T, S, 1)}, ValueError, f"second has D = 1 (shape [{T}, {S}, 1]), but first has {D}"),
        (
            {"second": x(T, S, D, dtype=torch.float64)},
            TypeError,
            "second is float64, but first is float32: they must agree",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature must be a finite number above 0, got -1"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a finite number above 0, got inf"),
        ({"temperature": None}, ValueError, "temperature must be a finite number above 0, got None"),
    ],
    "functional_mlp": [
        *of_tensor("x", "[T, B, I]", (T, S, D)),
        ({"weights": x(2, 4, D)}, TypeError, "weights must be a list or tuple of tensors, got Tensor"),
        ({"weights": None}, TypeError, "weights must be a list or tuple of tensors, got NoneType"),
        ({"weights": []}, ValueError, "weights must hold at least one layer, got none"),
        ({"weights": [x(4, D), None]}, TypeError, "weights[1] must be a tensor, got NoneType"),
        ({"weights": [x(D), x(3, 4)]}, ValueError, "weights[0] must have shape [T, O, I] or [O, I], got [6]"),
        (
            {"weights": [x(4, 5), x(3, 4)]},
            ValueError,
            "weights[0] has I = 5 (shape [1, 4, 5]), but its input has 6",
        ),
        (
            {"weights": [x(4, D), x(3, 7)]},
            ValueError,
            "weights[1] has I = 7 (shape [1, 3, 7]), but its input has 4",
        ),
        (
            {"weights": [x(4, D), x(3, 3, 4)]},
            ValueError,
            "weights[1] has T = 3 (shape [3, 3, 4]), but the others have 2",
        ),
        (
            {"weights": [x(4, D, dtype=torch.int32), x(3, 4)]},
            TypeError,
            FLOATING.format("weights[0]", "int32"),
        ),
        ({"weights": [x(4, D), x(3, 4, device="meta")]}, ValueError, META.format("weights[1]")),
        (
            {"weights": [x(4, D), x(3, 4, dtype=torch.float64)]},
            TypeError,
            "weights[1] is float64, but x is float32: they must agree",
        ),
        ({"biases": x(2, 4)}, TypeError, "biases must be a list or tuple of tensors, got Tensor"),
        ({"biases": [x(4)]}, ValueError, "biases must hold one per layer = 2, got 1"),
        ({"biases": [x(4), 0.0]}, TypeError, "biases[1] must be a tensor, got float"),
        (
            {"biases": [x(1, T, 4), x(3)]},
            ValueError,
            "biases[0] must have shape [T, O] or [O], got [1, 2, 4]",
        ),
        ({"biases": [x(5), x(3)]}, ValueError, "biases[0] has O = 5 (shape [1, 5]), but weights[0] has 4"),
        (
            {"biases": [x(3, 4), x(3)]},
            ValueError,
            "biases[0] has T = 3 (shape [3, 4]), but the others have 2",
        ),
        (
            {"biases": [x(4), x(3, dtype=torch.bfloat16)]},
            TypeError,
            "biases[1] is bfloat16, but x is float32: they must",
        ),
        ({"biases": [x(4, device="meta"), x(3)]}, ValueError, META.format("biases[0]")),
        (
            {"activation": "ReLU"},
            ValueError,
            "activation must be one of identity, relu, tanh, sigmoid, silu, gelu, sine; got 'ReLU'",
        ),
        ({"activation": torch.relu}, ValueError, "activation must be one of identity, relu, tanh,"),
    ],
    "norm_act_pool": [
        ({"x": None}, TypeError, "x must be a tensor of shape [T, B, C, H, W] or [T, B, C, L], got NoneType"),
        ({"x": x(T, 3, 4)}, ValueError, "x must have shape [T, B, C, H, W] or [T, B, C, L], got [2, 3, 4]"),
        ({"x": x(T, 3, 4, 6, 5, dtype=torch.int64)}, TypeError, FLOATING.format("x", "int64")),
        ({"x": x(T, 3, 4, 6, 5, device="meta")}, ValueError, META.format("x")),
        *of_tensor("weight", "[T, C]", (T, 4))[4:],
        ({"weight": x(4)}, ValueError, "weight must have shape [T, C], got [4]"),
        ({"weight": x(3, 4)}, ValueError, "weight has T = 3 (shape [3, 4]), but the others have 2"),
        ({"bias": x(1, 3)}, ValueError, "bias has C = 3 (shape [1, 3]), but x has 4"),
        ({"bias": x(1, 4, dtype=torch.float64)}, TypeError, "bias is float64, but x is float32: they must agree"),
        ({"norm": "layernorm"}, ValueError, "norm must be one of batch, instance, group, layer, none; got 'layernorm'"),
        ({"groups": 2}, ValueError, "groups are of norm 'group' alone, got groups = 2 with norm 'batch'"),
        ({"groups": 3, "norm": "group"}, ValueError, "groups must divide C = 4, got 3"),
        ({"groups": 2.0, "norm": "group"}, TypeError, "groups must be an int, got float"),
        ({"running": x(2, 4)}, TypeError, "running must be a pair (mean, var) of tensors or None, got Tensor"),
        ({"running": (x(T, 4), None)}, TypeError, "running[1] must be a tensor of shape [T, C], got NoneType"),
        ({"running": (x(3, 4), x(1, 4))}, ValueError, "running[0] has T = 3 (shape [3, 4]), but the others have 2"),
        ({"running": (x(T, 4), x(T, 5))}, ValueError, "running[1] has C = 5 (shape [2, 5]), but x has 4"),
        (
            {"running": (x(T, 4), x(T, 4, dtype=torch.float64))},
            TypeError,
            "running[1] is float64, but x is float32: it must be that, or float32",
        ),
        (
            {"running": (x(T, 4), x(T, 4)), "norm": "layer"},
            ValueError,
            "running statistics are of norm 'batch' or 'instance', got norm 'layer'",
        ),
        ({"eps": -1e-5}, ValueError, "eps must be at least 0.0, got -1e-05"),
        ({"activation": "tanh"}, ValueError, "activation must be one of identity, relu, leaky_relu, gelu, silu; got"),
        ({"slope": -0.1}, ValueError, "slope must be at least 0.0, got -0.1"),
        ({"pool": "avg"}, ValueError, "pool must be one of none, max, average; got 'avg'"),
        (
            {"x": x(T, 3, 4, 6), "pool": "max"},
            ValueError,
            "pool must be none for x of shape [T, B, C, L], got 'max', which is of 2x2 pixels",
        ),
        ({"return_moments": 1}, TypeError, "return_moments must be True or False, got 1"),
        (
            {"return_moments": True, "norm": "layer"},
            ValueError,
            "return_moments gives what norm 'batch' finds in x, got norm 'layer'",
        ),
        (
            {"return_moments": True, "running": (x(T, 4), x(T, 4))},
            ValueError,
            "return_moments gives what norm 'batch' finds in x, got running statistics",
        ),
    ],
    "task_conv1d": [
        *of_tensor("x", "[T, B, C, L]", (T, 3, 4, 6)),
        *of_tensor("weight", "[T, O, C / groups, k]", (T, 5, 4, 3)),
        ({"stride": (1, 1)}, ValueError, "stride must be an int or one in a tuple, got 2 values"),
        ({"padding": "reflect"}, ValueError, "padding must be an int, 'same' or 'valid', got 'reflect'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs a stride of 1, got 2"),
        ({"weight": x(T, 5, 4, 7)}, ValueError, "x has L = 6 (shape [2, 3, 4, 6]) but the kernel covers 7 of them"),
    ],
    "task_conv2d": [
        *of_tensor("x", "[T, B, C, H, W]", (T, 3, 4, 6, 5)),
        *of_tensor("weight", "[T, O, C / groups, kh, kw]", (T, 5, 4, 3, 2)),
        *of_tensor("bias", "[T, O]", (T, 5))[4:],
        ({"bias": x(5)}, ValueError, "bias must have shape [T, O], got [5]"),
        ({"bias": x(1, 4)}, ValueError, "bias has O = 4 (shape [1, 4]), but weight has 5"),
        ({"weight": x(3, 5, 4, 3, 2)}, ValueError, "weight has T = 3 (shape [3, 5, 4, 3, 2]), but the others have 2"),
        (
            {"weight": x(T, 5, 3, 3, 2)},
            ValueError,
            "weight has C / groups = 3 (shape [2, 5, 3, 3, 2]), but x divided by groups has 4",
        ),
        (
            {"weight": x(T, 5, 4, 0, 2)},
            ValueError,
            "channels and kernel sizes must be at least 1, got x of shape [2, 3, 4, 6, 5] and weight of shape [2, 5, 4",
        ),
        (
            {"weight": x(T, 5, 4, 3, 2, dtype=torch.float64)},
            TypeError,
            "weight is float64, but x is float32: they must agree",
        ),
        ({"groups": 3}, ValueError, "groups must divide C = 4, got 3"),
        ({"groups": 2, "weight": x(T, 5, 2, 3, 2)}, ValueError, "groups must divide O = 5, got 2"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 0)}, ValueError, "stride[1] must be at least 1, got 0"),
        ({"stride": None}, TypeError, "stride must be an int, got NoneType"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation must be an int or a pair of them, got 3 values"),
        ({"dilation": (1.0, 1)}, TypeError, "dilation[0] must be an int, got float"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "SAME"}, ValueError, "padding must be an int, a pair, 'same' or 'valid', got 'SAME'"),
        ({"padding": "same", "stride": (1, 2)}, ValueError, "padding 'same' needs a stride of 1, got (1, 2)"),
        (
            {"padding": (0, 1), "dilation": 6},
            ValueError,
            "x has H = 6 (shape [2, 3, 4, 6, 5]) but the kernel covers 13 of them",
        ),
        (
            {"padding": (4, 0), "dilation": (7, 1)},
            ValueError,
            "x has H = 6 (shape [2, 3, 4, 6, 5]), padded to 14, but the kernel covers 15 of them",
        ),
        ({"x": x(T, 3, 4, 6, 0), "padding": "same"}, ValueError, "x has W = 0 (shape [2, 3, 4, 6, 0]) but the kernel"),
    ],
    "fast_weight_update": [
        ({"params": {"w": x(4, 3), "b": 1.0}}, TypeError, "params['b'] must be a tensor, got float"),
        ({"params": {"w": x(4, 3), "b": labels(4)}}, TypeError, FLOATING.format("params['b']", "int64")),
        ({"params": {"w": x(4, 3, device="meta"), "b": x(4)}}, ValueError, META.format("params['w']")),
        (
            {"grads": {"w": x(T, 4, 3)}},
            ValueError,
            "grads must have the structure of params, TreeSpec(dict,",
        ),
        (
            {"grads": [x(T, 4, 3), x(T, 4)]},
            ValueError,
            "grads must have the structure of params, TreeSpec(dict,",
        ),
        ({"grads": {"w": x(T, 4, 3), "b": None}}, TypeError, "grads['b'] must be a tensor, got NoneType"),
        ({"grads": {"w": labels(T, 4, 3), "b": x(T, 4)}}, TypeError, FLOATING.format("grads['w']", "int64")),
        ({"grads": {"w": x(T, 4, 3), "b": x(T, 4, device="meta")}}, ValueError, META.format("grads['b']")),
        (
            {"grads": {"w": x(T, 4, 3), "b": x(T, 5)}},
            ValueError,
            "grads['b'] must have the shape of params['b'] = [4], with or without a leading task dimension, got [2, 5]",
        ),
        (
            {"grads": {"w": x(T, 4, 3), "b": x(3, 4)}},
            ValueError,
            "params['b'] and its gradient have T = 3 (shapes [4] and [3, 4]), but the others have 2",
        ),
        (
            {"params": {"w": x(4, 3), "b": x()}, "grads": {"w": x(T, 4, 3), "b": x()}},
            ValueError,
            "params['b'] and its gradient have no task dimension (shape []), but the others have 2 tasks",
        ),
        (
            {"grads": {"w": x(T, 4, 3), "b": x(T, 4, dtype=torch.float64)}},
            TypeError,
            "grads['b'] is float64, but params['w'] is float32: they must agree",
        ),
        (
            {"params": {"w": x(4, 3), "b": x(4, dtype=torch.float64)}},
            TypeError,
            "params['b'] is float64, but params['w'] is float32: they must agree",
        ),
        ({"lr": None}, TypeError, "lr must be or hold floats or tensors, got NoneType"),
        ({"lr": True}, TypeError, "lr must be or hold floats or tensors, got bool"),
        ({"lr": "0.1"}, TypeError, "lr must be or hold floats or tensors, got str"),
        ({"lr": {"w": 0.1, "b": "0.1"}}, TypeError, "lr must be or hold floats or tensors, got str"),
        ({"lr": labels()}, TypeError, FLOATING.format("lr", "int64")),
        ({"lr": {"w": labels(4, 3), "b": 0.1}}, TypeError, FLOATING.format("lr", "int64")),
        ({"lr": x(device="meta")}, ValueError, META.format("lr")),
        (
            {"lr": {"w": 0.1}},
            ValueError,
            "lr must be a float, a tensor, or have the structure of params, TreeSpec(dict,",
        ),
        (
            {"lr": [0.1, 0.1]},
            ValueError,
            "lr must be a float, a tensor, or have the structure of params, TreeSpec(dict,",
        ),
        (
            {"lr": x(4, 3)},
            ValueError,
            "lr as one tensor must have one element or shape [T], got [4, 3]; for a rate per",
        ),
        (
            {"lr": x(5)},
            ValueError,
            "lr for params['w'] must have one element, shape [T], [*shape] or [T, *shape] with T = 2, "
            "shape = [4, 3]; got [5]",
        ),
        ({"lr": {"w": x(3, 4), "b": 0.1}}, ValueError, "T = 2, shape = [4, 3]; got [3, 4]"),
        ({"lr": {"w": x(3, 4, 3), "b": 0.1}}, ValueError, "T = 2, shape = [4, 3]; got [3, 4, 3]"),
        (
            {"params": x(T, 4), "grads": x(T, 4), "lr": x(5)},
            ValueError,
            "lr for params must have one element, shape [T], or the shape of one task's parameter, got [5] "
            "for a parameter of shape [2, 4]",
        ),
        (
            {"params": x(T), "grads": x(T, T), "lr": x(T)},
            ValueError,
            "lr of shape [2] may be a rate per task or per element of params [2]: give it shape",
        ),
    ],
}
