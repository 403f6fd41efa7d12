"""What the operators' own kinds look like, as far as ours use them: JSON schemas that know no other
field. From KEDA 2.17's ScaledObject and the Prometheus operator's PodMonitor."""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
LABELS = {"type": "object", "additionalProperties": TEXT}


def closed(required: str, **known: Any) -> dict[str, Any]:
    """An object of these fields and no others; `required` names those that have to be there."""
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def kind(spec: dict[str, Any]) -> dict[str, Any]:
    metadata = closed("name", name=TEXT, namespace=TEXT, labels=LABELS)
    return closed(
        "apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec
    )


POLICY = closed(
    "type value periodSeconds",
    type={"enum": ["Pods", "Percent"]},
    value={"type": "integer", "minimum": 1},
    periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
)
SCALING = closed(
    "policies",
    policies=several(POLICY),
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
)
TRIGGER = closed(
    "type metadata",
    type={"const": "prometheus"},
    metricType={"enum": ["AverageValue", "Value"]},
    metadata=closed(
        "serverAddress query threshold",
        serverAddress={"type": "string", "pattern": "^https?://"},
        query=TEXT,
        threshold={"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
    ),
)
BEHAVIOR = closed("scaleUp scaleDown", scaleUp=SCALING, scaleDown=SCALING)
RELABELING = closed(
    "targetLabel", targetLabel=TEXT, replacement=TEXT, sourceLabels={"type": "array", "items": TEXT}
)
ENDPOINT = closed(
    "port",
    port=TEXT,
    interval={"type": "string", "pattern": "^[0-9]+s$"},
    relabelings=several(RELABELING),
)

SCHEMAS = {
    ("keda.sh/v1alpha1", "ScaledObject"): kind(
        closed(
            "scaleTargetRef triggers",
            scaleTargetRef=closed("name", name=TEXT),
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            pollingInterval=COUNT,
            advanced=closed("", horizontalPodAutoscalerConfig=closed("", behavior=BEHAVIOR)),
            triggers=several(TRIGGER),
        )
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): kind(
        closed(
            "selector podMetricsEndpoints",
            selector=closed("matchLabels", matchLabels=LABELS),
            podMetricsEndpoints=several(ENDPOINT),
        )
    ),
}
