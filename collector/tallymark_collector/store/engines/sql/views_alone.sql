-- Nobody reads the views from here to the commit. What is outermost first, as readers take them: so none of them waits for
-- what is further in while we wait for it. (LOCK TABLE would take the tables, too, and writers' among them. This changes
-- nothing but takes the view alone.)
ALTER VIEW usage_daily RESET (security_barrier);
ALTER VIEW usage_by_period RESET (security_barrier);
ALTER VIEW usage_hourly RESET (security_barrier);
ALTER VIEW usage_day_current RESET (security_barrier);
ALTER VIEW usage_hour_current RESET (security_barrier);
ALTER VIEW usage_day_marked RESET (security_barrier);
