"""PromQL of the dashboards, over what the variables on top of them choose."""

from __future__ import annotations

CHOSEN = 'model_name=~"$model_name", instance=~"$instance"'
POLICY = 'policy=~"$policy"'
SEVERITY = 'severity=~"$severity"'


def of(metric: str, *matchers: str) -> str:
    """The chosen servers' series of a metric."""
    return f"{metric}{{{', '.join((CHOSEN, *matchers))}}}"


def rate(metric: str, *matchers: str) -> str:
    return f"rate({of(metric, *matchers)}[$__rate_interval])"


def increase(metric: str, *matchers: str) -> str:
    """Over all of the time that is shown."""
    return f"increase({of(metric, *matchers)}[$__range])"


def total(expression: str, *by: str) -> str:
    """The sum over servers and engines, apart by these labels."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def share(part: str, whole: str, match: str = "") -> str:
    """Nothing, rather than NaN, where there is no whole. match: how labels are matched, if not all."""
    return f"{part} / {match} ({whole} > 0)" if match else f"{part} / ({whole} > 0)"


def quantile(q: float, histogram: str, *by: str, matchers: tuple[str, ...] = ()) -> str:
    buckets = total(rate(f"{histogram}_bucket", *matchers), "le", *by)
    return f"histogram_quantile({q:g}, {buckets})"


def by_layer(metric: str, how: str = "avg") -> str:
    """A row for each layer; numbered with three digits, since Prometheus sorts labels as text."""
    padded = of(metric)
    for zeros, digits in (("0", "(..)"), ("00", "(.)")):
        padded = f'label_replace({padded}, "layer", "{zeros}$1", "layer", "{digits}")'
    return f"{how} by (layer) ({padded})"
