"""The operators that a training artifact's graphs may have: those that the exporter writes.

Each computes tensors from tensors and ends. There is no control flow among them, nothing that reads
files, and nothing with text.
"""

STANDARD = frozenset(  # one text, so that a line has many names
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast Ceil Clip Concat Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Elu Equal Erf Exp
    Expand Flatten Floor Gather GatherElements Gemm Greater GreaterOrEqual HardSigmoid Identity
    IsInf IsNaN LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mod Mul Neg Not
    Or Pad Pow Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize Round
    ScatterElements Sigmoid Sign Sin Sinh Slice Softmax Sqrt Squeeze Sub Tan Tanh Tile Transpose
    Unsqueeze Where Xor
    """.split()  # noqa: SIM905
)
CONTRIB = "com.microsoft"  # ONNX Runtime's own domain
BY_DOMAIN = {"": STANDARD, "ai.onnx": STANDARD, CONTRIB: frozenset(["FusedMatMul"])}
