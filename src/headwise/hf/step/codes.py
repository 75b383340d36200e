"""The numbers by which the native operators know norms, rotations and activations."""

# As csrc/kernels.h has them. "rms wide" does not round before it multiplies by the weight.
NORMS = {"rms": 1, "rms plus one": 2, "layer": 3, "rms wide": 4}
ROTATIONS = {"halves": 0, "neighbours": 1, "neighbours twice": 2, "halves once": 3}
# Of each class.
ACTIVATIONS = {
    "SiLUActivation": 0,
    "SiLU": 0,
    "GELUActivation": 1,
    "GELUTanh": 2,
    "NewGELUActivation": 2,
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
