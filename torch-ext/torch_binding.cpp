// What kernel-builder makes a module of. The ops are registered where they are written, in csrc/, under the name that
// build.toml gives them in place of fastmeta_native: one of its own for every build.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
