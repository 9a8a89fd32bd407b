"""Every instruction set against the oracle: not close, equal."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldbit.kernels import layout, native, reference

ISAS = [name for name in native.available() if name != native.REFERENCE]


def dense(x):
    return x


def channels_last(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def sliced(x):  # every stride larger than need be
    room = np.full([2 * size + 1 for size in x.shape], np.nan, np.float32)
    room[1::2, 1::2, 1::2, 1::2] = x
    return room[1::2, 1::2, 1::2, 1::2]


def transposed(x):
    return np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)


def mirrored(x):
    return x[:, ::-1, ::-1, ::-1]


def expanded(x):  # zero strides
    return np.broadcast_to(x[:, :1, :, :1], x.shape)


MEMORY = [dense, channels_last, sliced, transposed, mirrored, expanded]


@st.composite
def problems(draw):
    """The arguments of ``conv``: any geometry, memory order and number of planes, values of all kinds."""
    groups, segments = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (3, 2), (7, 1)]))
    run = draw(st.sampled_from([1, 2, 7, 16, 31, 32, 33, 48, 64, 100]))
    depthwise = draw(st.integers(0, 3)) == 0
    if depthwise:
        groups, segments, run = draw(st.sampled_from([2, 15, 16, 17, 32, 33, 70])), 1, 1
    images, height, width = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    out = groups * (1 if depthwise else draw(st.sampled_from([1, 3, 16, 17, 32, 40, 64, 90, 128, 150])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    x = rng.standard_normal((images, groups * segments * run, height, width), dtype=np.float32)
    x[rng.random(x.shape) < 0.1] = draw(st.sampled_from([0.0, -0.0, np.nan, -np.inf, 1e-45]))
    x = draw(st.sampled_from(MEMORY))(x)
    weight_planes, activation_planes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    disk = layout.pack_bits(rng.random((weight_planes, out, *kernel, segments * run)) < 0.5)
    w = layout.disk_to_kernel(disk, segments * run, groups=groups, segments=segments)
    weight_scales = rng.standard_normal((weight_planes, out, segments), dtype=np.float32)
    activation_scales = rng.random((images, activation_planes), dtype=np.float32)
    if images and draw(st.integers(0, 9)) == 0:
        activation_scales[0, 0] = np.nan
    bias = draw(st.sampled_from([None, rng.standard_normal(out, dtype=np.float32)]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    geometry = dict(
        stride=draw(pair),
        padding=draw(st.tuples(st.integers(0, 6), st.integers(0, 6))),
        dilation=draw(pair),
        out_size=draw(st.tuples(st.integers(0, 6), st.integers(0, 40))),
    )
    return (x, w, weight_scales, activation_scales, bias), geometry


@settings(deadline=None, max_examples=300)
@given(problems(), st.integers(1, 3))
def test_every_instruction_set_gives_the_same_numbers_as_the_reference(problem, threads):
    (x, w, weight_scales, activation_scales, bias), geometry = problem
    groups, segments = w.shape[1], w.shape[3]
    sizes = dict(
        in_channels_per_segment=x.shape[1] // (groups * segments), out_channels=weight_scales.shape[1]
    )
    packed = reference.pack_activation(x, activation_scales, groups, segments)
    integers = reference.conv_integers(packed, w, **geometry, **sizes)
    y = reference.conv(x, w, weight_scales, activation_scales, bias, **geometry)
    for isa in ISAS:
        with native.use(isa):
            got = native.pack_activation(x, activation_scales, groups, segments, threads)
            np.testing.assert_array_equal(got, packed, err_msg=isa)
            got = native.conv_integers(packed, w, **geometry, **sizes, threads=threads)
            np.testing.assert_array_equal(got, integers, err_msg=isa)
            got = native.conv(x, w, weight_scales, activation_scales, bias, **geometry, threads=threads)
            np.testing.assert_array_equal(got, y, err_msg=isa)


@settings(deadline=None, max_examples=200)
@given(problems(), st.data(), st.integers(1, 3))
def test_thresholds_slopes_and_residuals_too(problem, data, threads):
    (x, w, weight_scales, activation_scales, bias), geometry = problem
    groups, segments = w.shape[1], w.shape[3]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    nodes, runs, words = 2 ** activation_scales.shape[1] - 1, groups * segments, w.shape[6]
    thresholds = rng.standard_normal((nodes, runs, 32 * words), dtype=np.float32)
    ends = np.array([0.0, -0.0, np.inf, -np.inf], np.float32)
    thresholds = np.where(rng.random(thresholds.shape) < 0.2, rng.choice(ends, thresholds.shape), thresholds)
    flips = rng.integers(0, 2**32, (runs, words), np.uint32)
    out = (len(x), *geometry["out_size"], weight_scales.shape[1])
    extras = dict(
        slopes=data.draw(
            st.sampled_from(
                [None, np.zeros(out[-1], np.float32), rng.standard_normal(out[-1], dtype=np.float32)]
            )
        ),
        residual=data.draw(st.sampled_from([None, rng.standard_normal(out, dtype=np.float32)])),
    )
    if data.draw(st.booleans()):
        extras |= dict(thresholds=thresholds, flips=flips)
    packed = reference.pack_activation(
        x, activation_scales, groups, segments, thresholds=thresholds, flips=flips
    )
    y = reference.conv(x, w, weight_scales, activation_scales, bias, **geometry, **extras)
    for isa in ISAS:
        with native.use(isa):
            got = native.pack_activation(x, activation_scales, groups, segments, threads, thresholds, flips)
            np.testing.assert_array_equal(got, packed, err_msg=isa)
            got = native.conv(
                x, w, weight_scales, activation_scales, bias, **geometry, **extras, threads=threads
            )
            np.testing.assert_array_equal(got, y, err_msg=isa)


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("out", [8, 40])  # an incomplete block, and whole ones
def test_relu_of_infinities_and_no_numbers(isa, out):
    """As torch's: 0 of minus infinity, no number of none."""
    w = layout.disk_to_kernel(np.zeros((1, out, 1, 1, 1), np.uint8), 1)
    one, relu = np.ones((1, out, 1), np.float32), np.zeros(out, np.float32)
    expected = {-np.inf: 0, np.inf: np.inf, np.nan: np.nan, -2: 0, 3: 3}
    for scale, each in expected.items():  # of the activations, 16 pixels of 1: enough to look up
        x, scales = np.ones((1, 1, 4, 4), np.float32), np.full((1, 1), scale, np.float32)
        if isa == "reference":
            y = reference.conv(x, w, one, scales, out_size=(4, 4), slopes=relu)
        else:
            with native.use(isa):
                y = native.conv(x, w, one, scales, out_size=(4, 4), slopes=relu)
        np.testing.assert_array_equal(y, np.full((1, 4, 4, out), each, np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels, out", [(64, 40), (480, 80), (1000, 128), (1000, 150)])
def test_counts_where_every_bit_differs(isa, channels, out):
    """The most that partial counts in narrow integers have to hold, beside planes where none or half do."""
    a = np.zeros((4, 1, 12, 12, 1, -(-channels // 32)), np.uint32)
    a[1:3] = layout.bits_to_words(np.ones((2, 1, 12, 12, 1, channels), bool))
    a[3] = layout.bits_to_words(np.broadcast_to(np.arange(channels) % 2 == 0, (1, 12, 12, 1, channels)))
    disk = layout.pack_bits(np.ones((1, out, 3, 3, channels), bool))
    w = layout.disk_to_kernel(disk, channels)
    inside = np.minimum(3, 2 + np.minimum(np.arange(12), np.arange(12)[::-1]))
    taps = np.outer(inside, inside)[:, :, None]
    with native.use(isa):
        got = native.conv_integers(
            a, w, padding=(1, 1), out_size=(12, 12), in_channels_per_segment=channels, out_channels=out
        )
    for plane, each in enumerate((-1, 1, 1, 0)):
        plane_got = got.reshape(4, 12, 12, out)[plane]
        np.testing.assert_array_equal(plane_got, np.broadcast_to(each * channels * taps, plane_got.shape))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
@pytest.mark.parametrize(
    "size, channels, groups, kernel, options",
    [
        ((6, 150), 96, 1, 3, {}),  # rows in pieces
        ((4, 130), 190, 1, 3, {}),  # more of the input than tables are found for beforehand
        ((3, 40), 64, 1, 3, {"padding": (9, 5)}),  # windows outside the image
        ((20, 9), 96, 1, 3, {"dilation": (2, 3)}),  # taps apart, in whole steps
        ((20, 9), 64, 1, 3, {"dilation": (1, 2)}),  # and not in whole steps
        ((9, 11), 130, 1, 1, {}),
        ((9, 11), 130, 1, 2, {"stride": (1, 2)}),
        ((12, 12), 192, 2, 3, {"stride": (2, 2)}),
    ],
)
def test_windows_that_share_their_input(isa, size, channels, groups, kernel, options):
    """Two planes and several blocks of channels, in all the ways that tables of their nibbles are found."""
    rng = np.random.default_rng(0)
    per_group, out = channels // groups, 80 * groups
    a = layout.bits_to_words(rng.random((2, 2, *size, groups, per_group)) < 0.5)
    w = layout.disk_to_kernel(
        layout.pack_bits(rng.random((1, out, kernel, kernel, per_group)) < 0.5), per_group, groups=groups
    )
    options = {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 1)} | options
    sides = zip(size, *(options[name] for name in ("stride", "padding", "dilation")), strict=True)
    out_size = tuple(
        (side + 2 * pad - (kernel - 1) * apart - 1) // step + 1 for side, step, pad, apart in sides
    )
    got = {}
    for each in ("portable", isa):
        with native.use(each):
            got[each] = native.conv_integers(
                a, w, **options, out_size=out_size, in_channels_per_segment=per_group, out_channels=out
            )
    np.testing.assert_array_equal(got[isa], got["portable"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [(3, 3), (15, 17), (16, 16)])
def test_depthwise_windows_as_long_as_bytes_can_count_and_longer(isa, kernel):
    """Every bit differs: 15 x 17 taps are 255."""
    x = np.ones((1, 50, 18, 20), np.float32)
    w = layout.disk_to_kernel(layout.pack_bits(np.ones((1, 50, *kernel, 1), bool)), 1, groups=50)
    one = np.ones((1, 50, 1), np.float32), np.ones((1, 1), np.float32)
    size = 19 - kernel[0], 21 - kernel[1]
    with native.use(isa):
        got = native.conv(x, w, *one, out_size=size)
    np.testing.assert_array_equal(got, np.full((1, *size, 50), -kernel[0] * kernel[1], np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(5, 200, 1, 1), (1, 200, 70, 1), (2, 200, 9, 9), (3, 8192, 1, 1), (9, 66_000, 1, 1)]
)
def test_pixelwise_convolutions_and_long_sums(isa, shape):
    """Linear layers, a batch of single pixels, and counts past what a byte holds."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    disk = layout.pack_bits(rng.random((1, 24, 1, 1, shape[1])) < 0.5)
    w = layout.disk_to_kernel(disk, shape[1])
    scales = rng.random((1, 24, 1), dtype=np.float32), rng.random((shape[0], 2), dtype=np.float32)
    expected = reference.conv(x, w, *scales, out_size=shape[2:])
    with native.use(isa):
        np.testing.assert_array_equal(native.conv(x, w, *scales, out_size=shape[2:], threads=2), expected)
        disk[:] = 255  # every bit differs
        w = layout.disk_to_kernel(disk, shape[1])
        got = native.conv(np.abs(x), w, *scales, out_size=shape[2:])
        np.testing.assert_array_equal(got, reference.conv(np.abs(x), w, *scales, out_size=shape[2:]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("out", [16, 32, 24])  # whole blocks, and an incomplete one
@pytest.mark.parametrize("size, kernel", [((150, 1, 1), 1), ((1, 9, 20), 1), ((2, 3, 150), 3)])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_rows_longer_than_what_goes_out_at_once(isa, depthwise, out, size, kernel, planes):
    rng = np.random.default_rng(0)
    images, *image = size
    groups, run = (out, 1) if depthwise else (1, 40)
    x = channels_last(rng.standard_normal((images, groups * run, *image), dtype=np.float32))
    w = layout.disk_to_kernel(
        layout.pack_bits(rng.random((2, out, kernel, kernel, run)) < 0.5), run, groups=groups
    )
    scales = rng.random((2, out, 1), dtype=np.float32), rng.random((images, planes), dtype=np.float32)
    geometry = dict(padding=(kernel // 2, kernel // 2), out_size=tuple(image))
    options = dict(
        slopes=rng.standard_normal(out, dtype=np.float32),
        residual=rng.standard_normal((images, *image, out), dtype=np.float32),
    )
    bias = rng.standard_normal(out, dtype=np.float32)
    packed = reference.pack_activation(x, scales[1], groups)
    channels = dict(in_channels_per_segment=run, out_channels=out)
    integers = reference.conv_integers(packed, w, **geometry, **channels)
    expected = reference.conv(x, w, *scales, bias, **geometry, **options)
    with native.use(isa):
        np.testing.assert_array_equal(native.conv_integers(packed, w, **geometry, **channels), integers)
        np.testing.assert_array_equal(native.conv(x, w, *scales, bias, **geometry, **options), expected)


def test_more_images_than_the_workspace_holds():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 16, 96, 96), dtype=np.float32)
    w = layout.disk_to_kernel(layout.pack_bits(rng.random((1, 1, 1, 1, 16)) < 0.5), 16)
    scales = np.ones((1, 1, 1), np.float32), rng.random((40, 1), dtype=np.float32)
    y = native.conv(x, w, *scales, out_size=(96, 96), threads=2)
    np.testing.assert_array_equal(y, reference.conv(x, w, *scales, out_size=(96, 96)))


def small(**changes):
    arguments = dict(
        x=np.ones((2, 8, 4, 4), np.float32),
        w=layout.disk_to_kernel(np.zeros((1, 3, 1, 1, 1), np.uint8), 8),
        weight_scales=np.ones((1, 3, 1), np.float32),
        activation_scales=np.ones((2, 1), np.float32),
        bias=None,
        out_size=(4, 4),
    )
    return arguments | changes


@pytest.mark.parametrize("backend", native.available())
def test_out_is_written_in_place_and_returned(backend):
    out = np.full((2, 4, 4, 3), np.nan, np.float32)
    with native.use(backend):
        assert native.conv(**small(out=out)) is out
    assert (out == 8).all()


def floats(*shape):
    return np.ones(shape, np.float32)


MISTAKES = [
    (dict(x=floats(2, 8, 4)), r"x must be a float32 .* got float32 \[2, 8, 4\]"),
    (dict(x=np.ones((2, 8, 4, 4))), r"x must be a float32 .* got float64"),
    (dict(x=floats(2, 40, 4, 4)), r"1 words a tap, but 40 input channels .* take 2"),
    (dict(w=np.zeros([1] * 7 + [8], np.uint32)), r"w must be .* got uint32 \[1, 1, 1, 1, 1, 1, 1, 8\]"),
    (dict(weight_scales=floats(2, 3, 1)), r"weight_scales must be .*\[1, any, 1\], got .*\[2, 3, 1\]"),
    (dict(weight_scales=floats(1, 30, 1)), r"1 blocks a group, but 30 out channels"),
    (dict(activation_scales=floats(3, 1)), r"activation_scales must be .* got float32 \[3, 1\]"),
    (dict(activation_scales=floats(2, 9)), r"1 to 8 scales, got 9"),
    (dict(activation_scales=floats(2, 2)[:, ::2]), r"activation_scales must be C-contiguous"),
    (dict(bias=floats(4)), r"bias must be .* shape \[3\], got float32 \[4\]"),
    (dict(stride=(0, 1)), r"stride must be two integers of at least 1, got \(0, 1\)"),
    (dict(padding=(0, -1)), r"padding must be .* at least 0, got \(0, -1\)"),
    (dict(out=floats(2, 3, 4, 4)), r"out must be .*\[2, 4, 4, 3\], got float32 \[2, 3, 4, 4\]"),
    (dict(out=floats(2, 3, 4, 4).transpose(0, 2, 3, 1)), r"out must be C-contiguous"),
    (dict(flips=np.zeros((1, 1), np.uint32)), r"thresholds and flips go together"),
    (
        dict(thresholds=floats(1, 1, 8), flips=np.zeros((1, 1), np.uint32)),
        r"thresholds must be .*\[1, 1, 32\], got float32 \[1, 1, 8\]",
    ),
    (
        dict(
            activation_scales=floats(2, 5),
            thresholds=floats(31, 1, 32),
            flips=np.zeros((1, 1), np.uint32),
        ),
        r"thresholds serve 1 to 4 planes, got 5",
    ),
    (dict(slopes=floats(4)), r"slopes must be .* shape \[3\], got float32 \[4\]"),
    (dict(residual=floats(2, 3, 4, 4)), r"residual must be .*\[2, 4, 4, 3\], got float32 \[2, 3, 4, 4\]"),
    (dict(threads=0), r"threads must be at least 1, got 0"),
]


@pytest.mark.skipif(not ISAS, reason="no compiled core")
@pytest.mark.parametrize("changes, message", MISTAKES)
def test_mistakes_are_refused_with_what_was_given_and_expected(changes, message):
    with native.use(ISAS[-1]), pytest.raises(ValueError, match=message):
        native.conv(**small(**changes))


def test_read_only_arrays_are_read_but_not_written():
    arguments = small()
    for array in arguments.values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    out = np.empty((2, 4, 4, 3), np.float32)
    out.flags.writeable = False
    native.conv(**arguments)
    with pytest.raises(ValueError, match="out must be a writable array"), native.use(ISAS[-1]):
        native.conv(**arguments, out=out)


def test_use_chooses_and_a_with_block_restores():
    before = native.current()
    for name in native.available():
        with native.use(name):
            assert native.current() == name
            with native.use(native.REFERENCE):
                assert native.current() == native.REFERENCE
            assert native.current() == name
    assert native.current() == before
    with pytest.raises(native.KernelUnavailable, match=r"'sse9' cannot run here; there are .*reference"):
        native.use("sse9")
    assert native.current() == before


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_environment_chooses():
    show = "from foldbit.kernels import native; print(native.current())"
    for name in native.available():
        assert python(show, FOLDBIT_ISA=name).stdout.strip() == name
    wrong = python(show, FOLDBIT_ISA="sse9")
    assert (
        wrong.returncode
        and "KernelUnavailable: FOLDBIT_ISA=sse9: the backend 'sse9' cannot run here" in wrong.stderr
    )


WITHOUT_CORE = """
import sys, warnings
sys.modules["foldbit._native"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from foldbit.kernels import native
print([w.category.__name__ for w in caught if issubclass(w.category, native.NativeCoreMissing)])
try:
    print(native.current())
except native.KernelUnavailable as error:
    print("FOLDBIT_ISA=reference" in str(error))
"""


def test_a_missing_core_is_said_aloud_and_never_replaced_in_silence():
    environment = {"FOLDBIT_ISA": ""}
    assert python(WITHOUT_CORE, **environment).stdout.split("\n")[:2] == ["['NativeCoreMissing']", "True"]
    environment = {"FOLDBIT_ISA": "reference"}
    assert python(WITHOUT_CORE, **environment).stdout.split("\n")[:2] == ["[]", "reference"]
