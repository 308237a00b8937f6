/* PLL_API marks what libpyllmlite exports; everything else in it is hidden. */
#ifndef PYLLMLITE_EXPORT_H
#define PYLLMLITE_EXPORT_H

#if defined(__GNUC__)
#define PLL_API __attribute__((visibility("default")))
#else
#define PLL_API
#endif

#endif
