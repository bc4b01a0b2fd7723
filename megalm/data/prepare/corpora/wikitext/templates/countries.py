"""Countries whose code is a template that shows their name, ``{{FRA}}``: data. Source: the Olympic Committee."""

from __future__ import annotations

import re

COUNTRIES = dict(
    " ".join(pair.split()).split("=")
    for pair in re.split(
        r",\s+",
        """
        afg=Afghanistan, alb=Albania, alg=Algeria, ang=Angola, arg=Argentina, arm=Armenia, aus=Australia,
        aut=Austria, aze=Azerbaijan, bah=Bahamas, ban=Bangladesh, bel=Belgium, bih=Bosnia and Herzegovina,
        blr=Belarus, bol=Bolivia, bra=Brazil, bul=Bulgaria, can=Canada, chi=Chile, chn=China, civ=Ivory
        Coast, cmr=Cameroon, col=Colombia, crc=Costa Rica, cro=Croatia, cub=Cuba, cyp=Cyprus, cze=Czech
        Republic, den=Denmark, dom=Dominican Republic, ecu=Ecuador, egy=Egypt, eng=England, esp=Spain,
        est=Estonia, eth=Ethiopia, fin=Finland, fra=France, gbr=United Kingdom, geo=Georgia, ger=Germany,
        deu=Germany, gha=Ghana, gre=Greece, gua=Guatemala, hkg=Hong Kong, hon=Honduras, hun=Hungary,
        ina=Indonesia, ind=India, iri=Iran, irl=Ireland, irq=Iraq, isl=Iceland, isr=Israel, ita=Italy,
        jam=Jamaica, jpn=Japan, kaz=Kazakhstan, ken=Kenya, kor=South Korea, ksa=Saudi Arabia, lat=Latvia,
        lib=Lebanon, ltu=Lithuania, lux=Luxembourg, mar=Morocco, mas=Malaysia, mda=Moldova, mex=Mexico,
        mgl=Mongolia, mkd=North Macedonia, mne=Montenegro, ned=Netherlands, nld=Netherlands, nga=Nigeria,
        ngr=Nigeria, nor=Norway, nzl=New Zealand, pak=Pakistan, pan=Panama, par=Paraguay, per=Peru,
        phi=Philippines, pol=Poland, por=Portugal, prk=North Korea, qat=Qatar, rou=Romania, rsa=South
        Africa, rus=Russia, sco=Scotland, sen=Senegal, sgp=Singapore, slo=Slovenia, srb=Serbia,
        sui=Switzerland, svk=Slovakia, swe=Sweden, tha=Thailand, tun=Tunisia, tur=Turkey, uae=United Arab
        Emirates, ukr=Ukraine, uru=Uruguay, usa=United States, uzb=Uzbekistan, ven=Venezuela, vie=Vietnam,
        wal=Wales, zim=Zimbabwe
        """.strip(),
    )
)
