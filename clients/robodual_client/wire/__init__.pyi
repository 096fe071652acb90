from google.protobuf.descriptor_pool import DescriptorPool

from .common_pb2 import *
from .generalist_pb2 import *
from .specialist_pb2 import *

POOL: DescriptorPool
