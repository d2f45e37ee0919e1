// All of the DDIM step that is compiled once for each instruction set. Included as vector.h is.

#include "vector.h"
//
#include "philox.h"
//
#include "ddim_loop.h"
