"""torch.compile and torch.export see through the core, and give what eager code gives."""

import pytest
import torch

import foldbit as fb
from foldbit.core import schemes, solvers
from foldbit.kernels import native
from foldbit.nn import estimators

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-1", "gf-3", "alt-2"]


class Everything(torch.nn.Module):
    """All functions and several schemes and dims in one graph, for compiling takes seconds."""

    def forward(self, x):
        results = []
        for scheme in SCHEMES:
            scales = fb.solve(x, scheme, (1, -1))
            turn = fb.fold if schemes.parse(scheme).foldable else fb.encode
            planes = turn(x, scales, (1, -1))
            results += [scales, planes, fb.unfold(planes, scales, (1, -1))]
            results.append(fb.quantize(x, scheme).values())
        q = fb.quantize(x, "ls-2", dim=None)
        return [*results, q.scales, q.values(), q.error(x)]


def data(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 5, 3, 7, dtype=torch.float64, generator=generator)


def check(got, x):
    expected = Everything()(x)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_compile():
    torch.compiler.reset()
    check(torch.compile(Everything(), backend="aot_eager", fullgraph=True)(data(4)), data(4))


def test_compile_with_inductor():
    torch.compiler.reset()
    x = data(2).float()
    compiled = torch.compile(lambda x: fb.quantize(x, "ls-2").values(), fullgraph=True)
    try:
        got = compiled(x)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor cannot compile here: {error}")
    torch.testing.assert_close(got, fb.quantize(x, "ls-2").values())


def test_export_of_any_batch_size():
    exported = torch.export.export(Everything(), (data(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for n in [4, 1, 6]:
        check(exported.module()(data(n)), data(n))


def small(n):
    return data(n)[:, :1, :, :3]


class Searches(torch.nn.Module):
    def forward(self, x):
        return [fb.quantize(x, scheme, (1, 2, 3)).values() for scheme in ["ls-3", "lsf-3", "alt-4", "rg-4"]]


def test_searches_for_three_and_four_bits_are_operators_and_serve_any_batch_size():
    expected = Searches()(small(2))
    torch.compiler.reset()
    compiled = torch.compile(Searches(), backend="aot_eager", fullgraph=True)(small(2))
    exported = torch.export.export(Searches(), (small(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for got in (compiled, exported.module()(small(2))):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert any("solve_multibit" in target for target in targets(exported))


def targets(exported):
    return {str(n.target) for m in exported.graph_module.modules() for n in m.graph.nodes}


def test_compiled_graphs_call_the_native_core_and_exported_ones_are_plain_torch(monkeypatch):
    class Both(torch.nn.Module):
        def forward(self, x):
            scales = fb.solve(x, "ls-2")
            return scales, fb.solve(x, "gf-2"), estimators.approximate(x, scales, (3,), "scaled")

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(Both(), backend=backend, fullgraph=True)(data(2))
    (graph,) = graphs
    assert "foldbit.solve_rows" in graph.code and "sort" not in graph.code
    assert "foldbit.approximate" in graph.code

    def refuse(*_, **__):
        raise AssertionError("an exported graph reached for the native core")

    monkeypatch.setattr(native, "solve_rows", refuse)
    monkeypatch.setattr(native, "approximate_rows", refuse)
    for strict in [False, True]:
        found = targets(torch.export.export(Both(), (data(2),), strict=strict))
        assert not any("foldbit" in target for target in found) and any("sort" in target for target in found)


class OfAnyLength(torch.nn.Module):
    def forward(self, x):
        return fb.solve(x, "ls-2", dim=None), fb.solve(x, "ls-2", dim=(1, 2)), fb.solve(x, "ls-2")


def test_the_length_of_a_row_chooses_the_search_but_never_narrows_the_graph():
    """Per tensor, a row is as long as the batch is large: one graph has to serve every batch."""
    x = torch.randn(3, 2, solvers._LONG // 2, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(OfAnyLength(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [str(node.target) for module in exported.graph_module.modules() for node in module.graph.nodes]
    assert any("scatter_add" in t for t in targets) and any("sort" in t for t in targets)
    compiled = torch.compile(OfAnyLength(), backend="eager", fullgraph=True, dynamic=True)
    torch.compiler.reset()
    for y in [x, x[:1], torch.cat([x, x])]:
        for got, expected in zip(exported.module()(y), OfAnyLength()(y), strict=True):
            torch.testing.assert_close(got, expected)
        for got, expected in zip(compiled(y), OfAnyLength()(y), strict=True):
            torch.testing.assert_close(got, expected)
