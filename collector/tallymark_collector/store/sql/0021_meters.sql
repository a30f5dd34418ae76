-- The meters that a tenant has, for whoever asks by what names its usage comes: one look-up for each name and unit, however
-- many accounts and dimensions there are of it (`store/meters.py`).
CREATE INDEX usage_series_name ON usage_series (tenant, meter, unit);
