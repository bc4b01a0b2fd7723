"""Units of measurement: data. A scale is the size of a unit in the SI unit of its kind (m, m², kg, Pa …).

Source: the International System of Units (BIPM) and NIST Special Publication 811, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
        symbol: as written after a number.
        singular: its name.
        plural: its name after other numbers than one.
        kind: what it measures.
        scale: its size in the SI unit of the kind.
        other: code of the unit that it is converted to where none is named.
        offset: what its zero is in kelvins; temperatures only.
    """

    symbol: str
    singular: str
    plural: str
    kind: str
    scale: float
    other: str
    offset: float = 0.0


_FOOT, _MILE, _POUND, _GALLON_US, _GALLON_UK, _G = 0.3048, 1609.344, 0.45359237, 3.785411784e-3, 4.54609e-3, 9.80665
_TABLE: tuple[tuple[str, str, str, str, str, float, str], ...] = (
    ("km", "km", "kilometre", "", "length", 1e3, "mi"),
    ("m", "m", "metre", "", "length", 1.0, "ft"),
    ("cm", "cm", "centimetre", "", "length", 1e-2, "in"),
    ("mm", "mm", "millimetre", "", "length", 1e-3, "in"),
    ("dm", "dm", "decimetre", "", "length", 1e-1, "in"),
    ("um μm µm", "μm", "micrometre", "", "length", 1e-6, "in"),
    ("nm", "nm", "nanometre", "", "length", 1e-9, "in"),
    ("mi mile miles", "mi", "mile", "", "length", _MILE, "km"),
    ("ft foot feet", "ft", "foot", "feet", "length", _FOOT, "m"),
    ("in inch inches", "in", "inch", "inches", "length", 0.0254, "mm"),
    ("yd yard yards", "yd", "yard", "", "length", 0.9144, "m"),
    ("nmi", "nmi", "nautical mile", "", "length", 1852.0, "km"),
    ("furlong", "furlong", "furlong", "", "length", 201.168, "ft"),
    ("fathom", "fathom", "fathom", "", "length", 1.8288, "ft"),
    ("chain", "chain", "chain", "", "length", 20.1168, "ft"),
    ("league", "league", "league", "", "length", 3 * _MILE, "km"),
    ("hand", "h", "hand", "", "length", 0.1016, "cm"),
    ("au", "au", "astronomical unit", "", "length", 149597870700.0, "km"),
    ("ly", "ly", "light-year", "", "length", 9460730472580800.0, "pc"),
    ("pc", "pc", "parsec", "", "length", 3.0856775814914e16, "ly"),
    ("km2 sqkm", "km²", "square kilometre", "", "area", 1e6, "sqmi"),
    ("m2 sqm", "m²", "square metre", "", "area", 1.0, "sqft"),
    ("cm2 sqcm", "cm²", "square centimetre", "", "area", 1e-4, "sqin"),
    ("mm2 sqmm", "mm²", "square millimetre", "", "area", 1e-6, "sqin"),
    ("ha hectare", "ha", "hectare", "", "area", 1e4, "acre"),
    ("sqmi mi2", "sq mi", "square mile", "", "area", _MILE**2, "km2"),
    ("sqft ft2", "sq ft", "square foot", "square feet", "area", _FOOT**2, "m2"),
    ("sqin in2", "sq in", "square inch", "square inches", "area", 0.0254**2, "cm2"),
    ("sqyd yd2", "sq yd", "square yard", "", "area", 0.9144**2, "m2"),
    ("acre acres", "acre", "acre", "", "area", 4046.8564224, "ha"),
    ("kg", "kg", "kilogram", "", "mass", 1.0, "lb"),
    ("g", "g", "gram", "", "mass", 1e-3, "oz"),
    ("mg", "mg", "milligram", "", "mass", 1e-6, "gr"),
    ("t tonne tonnes", "t", "tonne", "", "mass", 1e3, "LT"),
    ("lb lbs pound", "lb", "pound", "", "mass", _POUND, "kg"),
    ("oz", "oz", "ounce", "", "mass", _POUND / 16, "g"),
    ("ozt troyounce", "ozt", "troy ounce", "", "mass", 0.0311034768, "g"),
    ("gr", "gr", "grain", "", "mass", 6.479891e-5, "g"),
    ("st stone", "st", "stone", "stone", "mass", 14 * _POUND, "lb"),
    ("LT long_ton", "long tons", "long ton", "", "mass", 2240 * _POUND, "t"),
    ("ST short_ton", "short tons", "short ton", "", "mass", 2000 * _POUND, "t"),
    ("L l litre liter", "L", "litre", "", "volume", 1e-3, "USgal"),
    ("ml mL", "mL", "millilitre", "", "volume", 1e-6, "impoz"),
    ("cl cL", "cL", "centilitre", "", "volume", 1e-5, "impoz"),
    ("hl hL", "hL", "hectolitre", "", "volume", 0.1, "impgal"),
    ("m3", "m³", "cubic metre", "", "volume", 1.0, "cuft"),
    ("cm3 cc", "cm³", "cubic centimetre", "", "volume", 1e-6, "cuin"),
    ("km3", "km³", "cubic kilometre", "", "volume", 1e9, "cumi"),
    ("cuft ft3", "cu ft", "cubic foot", "cubic feet", "volume", _FOOT**3, "m3"),
    ("cuin in3", "cu in", "cubic inch", "cubic inches", "volume", 0.0254**3, "cm3"),
    ("cuyd yd3", "cu yd", "cubic yard", "", "volume", 0.9144**3, "m3"),
    ("cumi mi3", "cu mi", "cubic mile", "", "volume", _MILE**3, "km3"),
    ("USgal U.S.gal USgallon gal", "US gal", "US gallon", "", "volume", _GALLON_US, "L"),
    ("impgal imp.gal", "imp gal", "imperial gallon", "", "volume", _GALLON_UK, "L"),
    ("USoz usfloz", "US fl oz", "US fluid ounce", "", "volume", _GALLON_US / 128, "ml"),
    ("impoz impfloz", "imp fl oz", "imperial fluid ounce", "", "volume", _GALLON_UK / 160, "ml"),
    ("USqt", "US qt", "US quart", "", "volume", _GALLON_US / 4, "L"),
    ("USpt", "US pt", "US pint", "", "volume", _GALLON_US / 8, "L"),
    ("imppt", "imp pt", "imperial pint", "", "volume", _GALLON_UK / 8, "L"),
    ("oilbbl bbl", "bbl", "barrel", "", "volume", 42 * _GALLON_US, "m3"),
    ("acre.ft acreft acre·ft", "acre⋅ft", "acre-foot", "acre-feet", "volume", 4046.8564224 * _FOOT, "m3"),
    ("km/h kph kmh", "km/h", "kilometre per hour", "kilometres per hour", "speed", 1 / 3.6, "mph"),
    ("m/s", "m/s", "metre per second", "metres per second", "speed", 1.0, "ft/s"),
    ("km/s", "km/s", "kilometre per second", "kilometres per second", "speed", 1e3, "mi/s"),
    ("mph mi/h", "mph", "mile per hour", "miles per hour", "speed", _MILE / 3600, "km/h"),
    ("mi/s", "mi/s", "mile per second", "miles per second", "speed", _MILE, "km/s"),
    ("ft/s", "ft/s", "foot per second", "feet per second", "speed", _FOOT, "m/s"),
    ("kn knot", "kn", "knot", "", "speed", 1852 / 3600, "km/h"),
    ("m3/s", "m³/s", "cubic metre per second", "cubic metres per second", "flow", 1.0, "cuft/s"),
    ("cuft/s", "cu ft/s", "cubic foot per second", "cubic feet per second", "flow", _FOOT**3, "m3/s"),
    (
        "PD/km2 /km2",
        "/km²",
        "inhabitant per square kilometre",
        "inhabitants per square kilometre",
        "density",
        1e-6,
        "/sqmi",
    ),
    (
        "PD/sqmi /sqmi",
        "/sq mi",
        "inhabitant per square mile",
        "inhabitants per square mile",
        "density",
        _MILE**-2,
        "/km2",
    ),
    ("W", "W", "watt", "", "power", 1.0, "hp"),
    ("kW", "kW", "kilowatt", "", "power", 1e3, "hp"),
    ("MW", "MW", "megawatt", "", "power", 1e6, "hp"),
    ("hp bhp shp ihp", "hp", "horsepower", "horsepower", "power", 745.69987158227, "kW"),
    ("PS", "PS", "metric horsepower", "metric horsepower", "power", 735.49875, "kW"),
    ("J", "J", "joule", "", "energy", 1.0, "cal"),
    ("kJ", "kJ", "kilojoule", "", "energy", 1e3, "kcal"),
    ("MJ", "MJ", "megajoule", "", "energy", 1e6, "kWh"),
    ("cal", "cal", "calorie", "", "energy", 4.184, "J"),
    ("kcal", "kcal", "kilocalorie", "", "energy", 4184.0, "kJ"),
    ("kWh", "kWh", "kilowatt hour", "", "energy", 3.6e6, "MJ"),
    ("Nm N.m", "N⋅m", "newton metre", "", "torque", 1.0, "lbft"),
    ("lbft lb.ft", "lb⋅ft", "pound-foot", "pound-feet", "torque", _POUND * _G * _FOOT, "Nm"),
    ("N", "N", "newton", "", "force", 1.0, "lbf"),
    ("kN", "kN", "kilonewton", "", "force", 1e3, "lbf"),
    ("lbf", "lbf", "pound-force", "pounds-force", "force", _POUND * _G, "N"),
    ("Pa", "Pa", "pascal", "", "pressure", 1.0, "psi"),
    ("hPa", "hPa", "hectopascal", "", "pressure", 100.0, "inHg"),
    ("kPa", "kPa", "kilopascal", "", "pressure", 1e3, "psi"),
    ("MPa", "MPa", "megapascal", "", "pressure", 1e6, "psi"),
    ("bar", "bar", "bar", "", "pressure", 1e5, "psi"),
    ("mbar", "mbar", "millibar", "", "pressure", 100.0, "inHg"),
    ("atm", "atm", "standard atmosphere", "", "pressure", 101325.0, "kPa"),
    ("psi", "psi", "pound per square inch", "pounds per square inch", "pressure", _POUND * _G / 0.0254**2, "kPa"),
    ("inHg", "inHg", "inch of mercury", "inches of mercury", "pressure", 3386.389, "hPa"),
    ("mmHg", "mmHg", "millimetre of mercury", "millimetres of mercury", "pressure", 133.322387415, "kPa"),
    ("g/cm3", "g/cm³", "gram per cubic centimetre", "grams per cubic centimetre", "mass density", 1e3, "lb/cuin"),
    ("kg/m3", "kg/m³", "kilogram per cubic metre", "kilograms per cubic metre", "mass density", 1.0, "lb/cuft"),
    (
        "lb/cuin",
        "lb/cu in",
        "pound per cubic inch",
        "pounds per cubic inch",
        "mass density",
        _POUND / 0.0254**3,
        "g/cm3",
    ),
    (
        "lb/cuft",
        "lb/cu ft",
        "pound per cubic foot",
        "pounds per cubic foot",
        "mass density",
        _POUND / _FOOT**3,
        "kg/m3",
    ),
)
UNITS = (
    {
        code.replace("_", " "): Unit(symbol, singular, plural or f"{singular}s", kind, scale, other)
        for codes, symbol, singular, plural, kind, scale, other in _TABLE
        for code in codes.split()
    }
    | {
        code: Unit(symbol, name, names, "temperature", scale, other, offset)
        for codes, symbol, name, names, scale, offset, other in (
            ("C °C degC celsius", "°C", "degree Celsius", "degrees Celsius", 1.0, 273.15, "F"),
            ("F °F degF fahrenheit", "°F", "degree Fahrenheit", "degrees Fahrenheit", 5 / 9, 459.67 * 5 / 9, "C"),
            ("K", "K", "kelvin", "kelvins", 1.0, 0.0, "C"),
        )
        for code in codes.split()
    }
    | {
        code: Unit(symbol, name, names, "temperature difference", scale, other)
        for code, symbol, name, names, scale, other in (
            ("C-change", "°C", "degree Celsius", "degrees Celsius", 1.0, "F-change"),
            ("F-change", "°F", "degree Fahrenheit", "degrees Fahrenheit", 5 / 9, "C-change"),
        )
    }
)
"""By the codes that ``{{convert}}`` takes."""
PAIRS = {
    "ftin": ("ft", "in", 12),
    "ft in": ("ft", "in", 12),
    "stlb": ("st", "lb", 14),
    "st lb": ("st", "lb", 14),
    "lboz": ("lb", "oz", 16),
    "lb oz": ("lb", "oz", 16),
    "ydft": ("yd", "ft", 3),
    "yd ft": ("yd", "ft", 3),
    "mich": ("mi", "chain", 80),
    "mi yd": ("mi", "yd", 1760),
    "miyd": ("mi", "yd", 1760),
}
"""Two units that are written together, and how many of the second make one of the first."""
