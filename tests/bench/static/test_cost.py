"""Multiply-accumulates against the published counts at 480 x 480."""

import pytest

from bench.static import cost


def test_the_encoding_layer_is_0118_gmac():
    # 60 x 60 positions, 512 channels, 32 codewords, two matrix products: distances and sums.
    assert cost.encoding_gmac() == pytest.approx(3600 * 512 * 32 * 2 / 1e9)
    assert round(cost.encoding_gmac(), 3) == 0.118


def test_context_costs_what_its_layers_do():
    found = {row.network: row for row in cost.costs(("resnet50",))}
    fcn, paper, released, lateral = (found[name] for name in cost.NETWORKS)
    # Published counts of the trunk and the FCN head: 87.6 + 34.1 G.
    assert fcn.gmac == pytest.approx(121.7, rel=0.01)
    # The paper's form adds the Encoding and, of each image, two small linear layers.
    assert paper.gmac - fcn.gmac == pytest.approx(0.118, abs=0.002)
    # The released form adds a 1x1 convolution too: +0.87% of the published count.
    assert released.gmac - fcn.gmac == pytest.approx(0.118 + 3600 * 512 * 512 / 1e9, abs=0.002)
    assert released.over_fcn == pytest.approx(0.0087, abs=0.0003)
    assert lateral.over_fcn == pytest.approx(0.24, abs=0.01)
