// benchmarks/tuning/driver.cu for the host. The standard headers come first: the shim has macros that they stumble
// on.
#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "shim.h"

#include "../../../benchmarks/tuning/driver.cu"
