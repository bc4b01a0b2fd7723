"""Names that wikitext may use: data, by language. Sources: MediaWiki's message files and the list of Wikipedias."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


LANGUAGES = words("""
    aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar
    bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca cbk-zam cdo ce
    ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz ee egl el eml en eo es
    et eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gsw gu guc
    gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig igl ii ik ilo inh io is it iu ja jam jbo
    jv ka kaa kab kaj kbd kbp kcg kg kge ki kj kk kl km kn knc ko koi kr krc ks ksh ku kus kv kw ky la lad lb lbe lez
    lfn lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mnw mo mos
    mr mrj ms
    mt mus mwl my myv mzn na nah nan nap nb nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny oc
    olo om or
    os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rki rm rmy rn ro roa-rup roa-tara rsk ru rue
    rup rw sa sah sat sc scn sco sd se sg sgs sh shi shn shy si simple sk skr sl sm smn sn so sq sr srn ss st
    stq su sv
    sw syl szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tpi tr trv ts tt tum tw ty tyv udm ug uk
    ur uz ve
    vec vep vi vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical zh-cn zh-min-nan zh-tw
    zh-yue zu
    """)
"""Prefixes of links to another language's article."""

FILE_NAMES = {
    "": ("file", "image"),
    "ar": ("ملف", "صورة"),
    "be": ("файл", "выява"),
    "bg": ("файл", "картинка"),
    "ca": ("fitxer", "imatge"),
    "cs": ("soubor", "obrázek"),
    "da": ("fil", "billede"),
    "de": ("datei", "bild"),
    "el": ("αρχείο", "εικόνα"),
    "eo": ("dosiero",),
    "es": ("archivo", "imagen"),
    "et": ("fail", "pilt"),
    "eu": ("fitxategi", "irudi"),
    "fa": ("پرونده", "تصویر"),
    "fi": ("tiedosto", "kuva"),
    "fr": ("fichier",),
    "gl": ("ficheiro", "imaxe"),
    "he": ("קובץ", "תמונה"),
    "hr": ("datoteka", "slika"),
    "hu": ("fájl", "kép"),
    "hy": ("պատկեր",),
    "id": ("berkas", "gambar"),
    "it": ("file", "immagine"),
    "ja": ("ファイル", "画像"),
    "kk": ("сурет",),
    "ko": ("파일", "그림"),
    "la": ("fasciculus", "imago"),
    "lt": ("vaizdas",),
    "lv": ("attēls",),
    "mk": ("податотека", "слика"),
    "nl": ("bestand", "afbeelding"),
    "no": ("fil", "bilde"),
    "nn": ("fil", "bilde"),
    "pl": ("plik", "grafika"),
    "pt": ("ficheiro", "arquivo", "imagem"),
    "ro": ("fișier", "fişier", "imagine"),
    "ru": ("файл", "изображение"),
    "sh": ("datoteka", "slika"),
    "sk": ("súbor", "obrázok"),
    "sl": ("slika", "datoteka"),
    "sr": ("датотека", "слика", "datoteka"),
    "sv": ("fil", "bild"),
    "th": ("ไฟล์", "ภาพ"),
    "tr": ("dosya", "resim"),
    "uk": ("файл", "зображення"),
    "vi": ("tập tin", "hình"),
    "zh": ("文件", "檔案", "档案", "图像", "圖像", "图片"),
}
CATEGORY_NAMES = {
    "": ("category",),
    "ar": ("تصنيف",),
    "be": ("катэгорыя",),
    "bg": ("категория",),
    "ca": ("categoria",),
    "cs": ("kategorie",),
    "da": ("kategori",),
    "de": ("kategorie",),
    "el": ("κατηγορία",),
    "eo": ("kategorio",),
    "es": ("categoría",),
    "et": ("kategooria",),
    "eu": ("kategoria",),
    "fa": ("رده",),
    "fi": ("luokka",),
    "fr": ("catégorie",),
    "gl": ("categoría",),
    "he": ("קטגוריה",),
    "hr": ("kategorija",),
    "hu": ("kategória",),
    "hy": ("կատեգորիա",),
    "id": ("kategori",),
    "it": ("categoria",),
    "kk": ("санат",),
    "ko": ("분류",),
    "la": ("categoria",),
    "lt": ("kategorija",),
    "lv": ("kategorija",),
    "mk": ("категорија",),
    "nl": ("categorie",),
    "no": ("kategori",),
    "nn": ("kategori",),
    "pl": ("kategoria",),
    "pt": ("categoria",),
    "ro": ("categorie",),
    "ru": ("категория",),
    "sh": ("kategorija",),
    "sk": ("kategória",),
    "sl": ("kategorija",),
    "sr": ("категорија", "kategorija"),
    "sv": ("kategori",),
    "th": ("หมวดหมู่",),
    "tr": ("kategori",),
    "uk": ("категорія",),
    "vi": ("thể loại",),
    "zh": ("分类", "分類"),
}

REDIRECTS = words("""
    redirect weiterleitung redirection redirección redireccion rinvia rinvio redirecionamento redirecciona
    перенаправление
    перенапр перенаправлення перенаправляне виж пренасочване преусмери przekieruj patrz tam doorverwijzing
    omdirigering
    omdiriger omdirigering ohjaus uudelleenohjaus přesměruj presmeruj átirányítás redirectare redirecţionează
    yönlendirme
    yönlendir تحويل הפניה تغییرمسیر تغییر_مسیر 転送 リダイレクト
    넘겨주기 重定向 重新導向 đổi alih lencong ανακατευθυνση ανακατεύθυνση
    suuna birzuzendu preusmjeri preusmeri preusmeritev alidirekti alidirektu tilvísun
    перанакіраванне अनुप्रेषित เปลี่ยนทาง ath-sheòladh ail-cyfeirio пренасочување վերահղում aanstuur doorverwysing
    """)
"""Words that begin a redirect, after ``#``."""

SWITCHES = words("""
    NOTOC FORCETOC TOC NOEDITSECTION NEWSECTIONLINK NONEWSECTIONLINK NOGALLERY HIDDENCAT EXPECTUNUSEDCATEGORY
    EXPECTUNUSEDTEMPLATE NOCONTENTCONVERT NOCC NOTITLECONVERT NOTC INDEX NOINDEX STATICREDIRECT DISAMBIG ARCHIVEDTALK
    NOTALK EXPECTED_UNCONNECTED_PAGE EXPECT_UNUSED_CATEGORY
    KEIN_INHALTSVERZEICHNIS KEININHALTSVERZEICHNIS INHALTSVERZEICHNIS INHALTSVERZEICHNIS_ERZWINGEN KEINE_GALERIE
    KEIN_INDEX INDIZIEREN NICHT_INDIZIEREN ABSCHNITTE_NICHT_BEARBEITEN VERSTECKTE_KATEGORIE BEGRIFFSKLÄRUNG
    AUCUNSOMMAIRE AUCUNETDM SOMMAIRE TDM FORCERSOMMAIRE FORCERTDM AUCUNEGALERIE AUCUNINDEX SECTIONNONEDITABLE
    NOTDC TDC FORZARTDC FORZAR_TDC NOTABLADECONTENIDOS NOGALERÍA NOINDEXAR INDEXAR NOEDITARSECCION CATEGORÍAOCULTA
    NOINDICE INDICE FORZAINDICE NOINDICIZZA INDICIZZA NOSOMMARIO
    SEMTDC SEMSUMARIO TDC SUMARIO FORCARTDC FORCARSUMARIO SEMGALERIA NAOINDEXAR NÃOINDEXAR
    GEENINHOUD INHOUD INHOUD_DWINGEN FORCEERINHOUD NIETINDEXEREN GEENGALERIJ
    BEZSPISU SPIS WYMUŚSPIS BEZGALERII
    БЕЗСОДЕРЖАНИЯ БЕЗ_СОДЕРЖАНИЯ БЕЗ_ОГЛ БЕЗОГЛАВЛЕНИЯ ОГЛ ОГЛАВЛЕНИЕ СОДЕРЖАНИЕ ОБЯЗ_ОГЛ ОБЯЗАТЕЛЬНОЕ_СОДЕРЖАНИЕ
    БЕЗ_ГАЛЕРЕИ БЕЗ_ИНДЕКСА ИНДЕКС БЕЗ_РЕДАКТИРОВАНИЯ_РАЗДЕЛА СКРЫТАЯ_КАТЕГОРИЯ НЕ_ИНДЕКСИРОВАТЬ
    БЕЗСЪДЪРЖАНИЕ СЪДЪРЖАНИЕ ПОСТАВИСЪДЪРЖАНИЕ БЕЗГАЛЕРИЯ
    БЕЗЗМІСТУ БЕЗ_ЗМІСТУ ЗМІСТ ОБОВ_ЗМІСТ БЕЗ_ГАЛЕРЕЇ БЕЗ_ІНДЕКСУ
    INGENINNEHÅLLSFÖRTECKNING INNEHÅLLSFÖRTECKNING ALLTIDINNEHÅLLSFÖRTECKNING INGETGALLERI
    EISISLUOTTELOA SISÄLLYSLUETTELO SISLUETTELO PAKOTASISLUET ЗАСОДРЖАЈ
    TOPPENAVINNHOLD INGENINNHOLDSFORTEGNELSE INGEN_INDHOLDSFORTEGNELSE İÇİNDEKİLERYOK İÇİNDEKİLER BEZOBSAHU OBSAH
    目次非表示 目次 目次強制 无目录 無目錄 目录 目錄
    强制目录 목차숨김 목차 목차보임 لافهرس فهرس ללא_תוכן_עניינים תוכן_עניינים
    """)
"""Words between double underscores that direct MediaWiki and show nothing."""

MEDIA_OPTIONS = frozenset(
    word.replace("_", " ")
    for word in words(
        """
        thumb thumbnail frame framed frameless border left right center centre none baseline sub super sup top
        text-top middle
        bottom text-bottom upright
        mini miniatur miniatura gerahmt ohne rahmenlos rand rechts links zentriert ohne hochkant hoch tief oben
        mitte unten
        vignette cadre encadré enc sans_cadre non_encadré bordure gauche droite droit gauche centré centre néant
        neant redresse
        miniaturadeimagen mini miniatura marco enmarcado marcado sinmarco sin_enmarcar sin_marco borde derecha der
        dcha izquierda izq centro
        centrado centrada ninguna nada no línea_de_base arriba medio abajo vertical
        riquadrato incorniciato senza_cornice bordo destra sinistra centro nessuno originale verticale
        miniaturadaimagem commoldura semmoldura borda direita dir esquerda esq nenhum superiordireito superior acima
        meio abaixo
        miniatuur omkaderd kaderloos rand rechts links gecentreerd geen rechtop boven onder midden
        mały ramka bezramki bez_ramki obramowanie prawo lewo centruj brak
        миниатюра мини обрамить безрамки граница справа слева центр центриране без справа сверхусправа
        дясно д ляво л център центр ц н нищо рамка врамка безрамка ръб контур
        праворуч ліворуч центр без міні мініатюра обрамити безрамки границя зверху знизу посередині
        náhled miniatura rámeček okraj vpravo vlevo střed žádné
        miniatyr mini ram ramlös kantlinje höger vänster centrerad ingen stående
        pienoiskuva pienois kehystetty kehyksetön reunus oikea vasen keskitetty keski tyhjä yläoikea
        bélyegkép bélyeg miniatűr keretezett keretes keretnélküli jobb jobbra bal balra közép középre semmi
        küçükresim küçük çerçeveli çerçeve çerçevesiz sınır sağ sol orta yok dikey
        サムネイル フレーム フレームなし 境界 ボーダー 右 左 中央 なし 無し 縮小画像
        缩略图 縮圖 缩图 有框 无框 無框 边框 邊框 左 右 居中 置中 无 無
        섬네일 썸네일 축소판 프레임 테두리 오른쪽 왼쪽 가운데 없음
        تصغير مصغر يمين يسار مركز وسط بدون إطار بإطار بلا حدود
        ממוזער ממוסגר לא_ממוסגר שמאל ימין מרכז ללא גבול
        بندانگشتی انگشتدان انگشتی قاب چپ راست وسط هیچ بی‌قاب
        nhỏ khung không_khung viền phải trái giữa không
        мини десно лево центар нема рам умањено мало без
        mărunt cadru dreapta stânga centru nu minijatura okvir desno lijevo levo sredina sredino ništa
        μικρογραφία μινιατούρα πλαίσιο δεξιά αριστερά κέντρο κανένα
        miniature miniatura esquerra dreta centre cap eskuinera ezkerrera erdian irudi_txikia txikia
        pisi pöial paremal vasakul keskel tühi raam ingen mindre høyre venstre midtstilt midt højre lite miniatyrbilde
        jmpl kiri kanan pus tengah nir sīktēls pa_kreisi pa_labi mini dešinėje kairėje
        """
    )
)
"""Words that say how a picture is shown, in the languages of the larger Wikipedias."""
