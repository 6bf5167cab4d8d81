#pragma once

#ifdef ONEREC_BUILD
#define ONEREC_API __attribute__((visibility("default")))
#else
#define ONEREC_API
#endif
